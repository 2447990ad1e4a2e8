"""Measures with torch's profiler how long the device is busy during some steps, and with which kernels.

Owns the choice of the window and the arithmetic over what was recorded. The caller reports each submitted step. The
benchmark measures its peers by the same code. Profiling slows a process down, and stops it at the window's end while
the records are read. Measure times in another run.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]

NUM_SKIPPED: Final = 64  # steps before the profiler starts: prompts, and code that runs for the first time
NUM_DISCARDED: Final = 16  # steps that it records and drops, because they include the profiler's start
NUM_PROFILED: Final = 64


@dataclass(frozen=True)
class DeviceActivity:
    """One kernel, copy or fill on the device. Times in us, from any origin."""

    name: str
    start_us: float
    end_us: float


class StepProfiler:
    """Call `step()` each time a step has been submitted, from one thread. Writes `path` when its window is over.

    `marker`: a kernel that runs once at the start and once at the end of every step, if there is one.
    """

    def __init__(
        self,
        path: Path,
        device: torch.device,
        *,
        marker: str | None = None,
        num_skipped: int = NUM_SKIPPED,
        num_discarded: int = NUM_DISCARDED,
        num_profiled: int = NUM_PROFILED,
    ) -> None:
        self._path = path
        self._marker = marker
        self._num_profiled = num_profiled
        activity = torch.profiler.ProfilerActivity
        # On the CPU, operators replace kernels, so that this code runs without a GPU.
        self._on_cuda = device.type == "cuda"
        self._profile = torch.profiler.profile(
            activities=[activity.CUDA if self._on_cuda else activity.CPU],
            schedule=torch.profiler.schedule(
                skip_first=num_skipped, wait=0, warmup=num_discarded, active=num_profiled, repeat=1
            ),
            on_trace_ready=self._write,
        )
        self._profile.start()

    def step(self) -> None:
        self._profile.step()

    def _write(self, profile: Any) -> None:
        kind = DeviceType.CUDA if self._on_cuda else DeviceType.CPU
        activities = [
            DeviceActivity(event.name, event.time_range.start, event.time_range.end)
            for event in profile.events()
            if event.device_type == kind and not event.is_user_annotation and not event.name.startswith("ProfilerStep")
        ]
        summary = {"num_steps": self._num_profiled, **summarize(activities)}
        times = [(a.start_us, a.end_us) for a in activities if a.name == self._marker]
        if times:
            gaps_us = between_steps_us(times)
            summary["between_steps_percent"] = 100 * sum(gaps_us) / summary["window_us"]
            summary["between_steps_p50_us"] = median(gaps_us) if gaps_us else 0.0
            summary["between_steps_max_us"] = max(gaps_us, default=0.0)
        # Renamed into place, so that a reader that waits for the file finds it complete.
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(summary))
        partial.rename(self._path)


def summarize(activities: Iterable[DeviceActivity]) -> dict[str, Any]:
    """Summarise the device's activities from the first one's start to the last one's end.

    `busy_percent` is the union of all activities over that time; overlapping activities count once. `kernels` has a row
    of [name, count, total us] for each name, the longest first.
    """
    activities = list(activities)
    if not activities:
        return {"window_us": 0.0, "busy_us": 0.0, "busy_percent": 0.0, "num_activities": 0, "kernels": []}
    totals: dict[str, tuple[int, float]] = {}
    for activity in activities:
        count, total_us = totals.get(activity.name, (0, 0.0))
        totals[activity.name] = (count + 1, total_us + activity.end_us - activity.start_us)
    window_us = max(a.end_us for a in activities) - min(a.start_us for a in activities)
    busy_us = union_us((a.start_us, a.end_us) for a in activities)
    kernels = [[name, *totals[name]] for name in sorted(totals, key=lambda name: -totals[name][1])]
    return {
        "window_us": window_us,
        "busy_us": busy_us,
        "busy_percent": 100 * busy_us / window_us if window_us else 100.0,
        "num_activities": len(activities),
        "kernels": kernels,
    }


def between_steps_us(markers: Iterable[tuple[float, float]]) -> list[float]:
    """Return the times between each step's end and the next step's start, in us.

    `markers` are (start, end) of a kernel that runs at both ends of every step. It is unknown whether the first marker
    starts or ends a step. But steps take longer than the gaps between them, which tells the two cases apart.
    """
    ordered = sorted(markers)
    gaps = [start - end for (_, end), (start, _) in itertools.pairwise(ordered)]
    return min(gaps[::2], gaps[1::2], key=sum)


def union_us(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the total time that is covered by at least one of the intervals [start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
