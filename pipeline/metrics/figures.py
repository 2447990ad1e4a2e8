"""Turns two readings of the engine's counters into figures per step and per second.

The counters are those of `ipc/stats_page.py`, as `client.stats()` returns them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

Roles = dict[str, dict[str, float]]


@dataclass(frozen=True)
class DeviceTime:
    """The device's time in a window, in ns: busy, and idle by cause."""

    busy_ns: float
    no_work_ns: float  # idle: no request had tokens to compute
    scheduler_ns: float  # idle: there was work, and the GPU process had no step record yet
    copies_ns: float  # idle: the GPU process was copying inputs and launching kernels
    masks_ns: float = 0.0  # idle: a step waited for the masks of structured outputs

    @property
    def is_known(self) -> bool:
        """False for a window in which no step ended."""
        return self.busy_ns > 0

    @property
    def wait_share(self) -> float:
        """Share of the time with work in which the device was idle."""
        return self.waited_ns / max(self.busy_ns + self.waited_ns, 1.0)

    @property
    def waited_ns(self) -> float:
        """The time with work in which the device was idle."""
        return self.scheduler_ns + self.copies_ns + self.masks_ns

    def shares(self) -> dict[str, float]:
        """Share of each part, by name; together they are 1."""
        parts = {
            "busy": self.busy_ns, "no work": self.no_work_ns, "scheduler": self.scheduler_ns, "copies": self.copies_ns,
            "masks": self.masks_ns,
        }  # fmt: skip
        total = max(sum(parts.values()), 1.0)
        return {name: part / total for name, part in parts.items()}


@dataclass(frozen=True)
class Figures:
    """The work between two readings, `seconds` apart."""

    seconds: float
    num_steps: int
    num_prefill_steps: int  # those of them that computed prompt tokens
    num_sampled_tokens: int
    host_us_per_step: dict[str, float]  # CPU time of each process
    plan_us_per_step: float
    apply_us_per_step: float
    device: DeviceTime

    @property
    def device_us_per_step(self) -> float:
        return self.device.busy_ns / max(self.num_steps, 1) / 1e3

    @property
    def device_wait_share(self) -> float:
        """See DeviceTime.wait_share."""
        return self.device.wait_share

    @property
    def device_idle_share(self) -> float:
        """Share of the device's time in which it was idle, for any cause."""
        return 1 - self.device.shares()["busy"]

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
    """A measurement from one reading of the counters to another."""

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
        busy_ns, scheduler_ns, copies_ns, masks_ns = (
            change("scheduler", f"device_{name}_ns") for name in ("busy", "scheduler", "copies", "masks")
        )
        # The idle time before a step is counted when that step ends. Only the part inside the window belongs here.
        room_ns = max(0.0, seconds * 1e9 - busy_ns - scheduler_ns - copies_ns - masks_ns)
        no_work_ns = min(change("scheduler", "device_no_work_ns"), room_ns)
        return Figures(
            seconds=seconds,
            num_steps=num_steps,
            num_prefill_steps=int(change("scheduler", "num_prefill_steps")),
            num_sampled_tokens=int(change("scheduler", "num_sampled_tokens")),
            host_us_per_step={role: change(role, "cpu_ns") / per_step / 1e3 for role in after},
            plan_us_per_step=change("scheduler", "plan_ns") / per_step / 1e3,
            apply_us_per_step=change("scheduler", "apply_ns") / per_step / 1e3,
            device=DeviceTime(busy_ns, no_work_ns, scheduler_ns, copies_ns, masks_ns),
        )
