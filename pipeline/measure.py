"""Turns two readings of the engine's counters into figures per step and per second.

The counters are those of `ipc/stats.py`, as `client.stats()` returns them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

Roles = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Figures:
    """What happened between two readings, `seconds` apart."""

    seconds: float
    num_steps: int
    num_prefill_steps: int  # of these, the ones that compute prompts
    num_sampled_tokens: int
    host_us_per_step: dict[str, float]  # CPU time of each process
    plan_us_per_step: float
    apply_us_per_step: float
    device_us_per_step: float
    device_wait_share: float  # of the time in which there was work: the device had none of it yet
    device_no_work_share: float  # of all time
    device_idle_share: float  # of the device's time from step to step: it ran none, whatever the reason

    @property
    def steps_per_s(self) -> float:
        return self.num_steps / self.seconds

    @property
    def tokens_per_s(self) -> float:
        return self.num_sampled_tokens / self.seconds

    @property
    def tokens_per_step(self) -> float:
        return self.num_sampled_tokens / max(self.num_steps, 1)


class Window:
    """A measurement that is under way: opened with one reading, closed with another."""

    def __init__(self, before: Roles) -> None:
        self._before = before
        self._start = time.perf_counter()

    def close(self, after: Roles) -> Figures:
        """Figures between the two readings. A window without a step gives zeros."""
        seconds = time.perf_counter() - self._start

        def change(role: str, name: str) -> float:
            return float(after[role][name] - self._before[role][name])

        num_steps = int(change("scheduler", "num_steps"))
        per_step = max(num_steps, 1)
        busy, wait = change("scheduler", "device_busy_ns"), change("scheduler", "device_wait_ns")
        no_work = change("scheduler", "device_no_work_ns")
        return Figures(
            seconds=seconds,
            num_steps=num_steps,
            num_prefill_steps=int(change("scheduler", "num_prefill_steps")),
            num_sampled_tokens=int(change("scheduler", "num_sampled_tokens")),
            host_us_per_step={role: change(role, "cpu_ns") / per_step / 1e3 for role in after},
            plan_us_per_step=change("scheduler", "plan_ns") / per_step / 1e3,
            apply_us_per_step=change("scheduler", "apply_ns") / per_step / 1e3,
            device_us_per_step=busy / per_step / 1e3,
            device_wait_share=wait / max(busy + wait, 1.0),
            device_no_work_share=no_work / 1e9 / seconds,
            device_idle_share=(wait + no_work) / max(busy + wait + no_work, 1.0),
        )
