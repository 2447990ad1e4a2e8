"""Measures with torch's profiler how long the device is busy during some steps, and with which kernels.

Owns the choice of the window and the arithmetic over what was recorded. The caller reports each submitted step. The
benchmark measures its peers by the same code. Profiling slows a process down, and stops it at the window's end while
the records are read. Measure times in another run.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]

from ipc.records import StepRecord
from workers.gpu.profiling.step_loads import StepLoad, StepLoads

NUM_SKIPPED: Final = 64  # steps before the profiler starts: prompts, and code that runs for the first time
NUM_DISCARDED: Final = 16  # steps that it records and drops, because they include the profiler's start
NUM_PROFILED: Final = 64
COPIES: Final = ("Memcpy", "Memset")  # the names of copies and fills begin so; they may run beside a step's kernels


@dataclass(frozen=True)
class DeviceActivity:
    """One kernel, copy or fill on the device. Times in us, from any origin."""

    name: str
    start_us: float
    end_us: float


class StepProfiler:
    """Call `step()` each time a step has been submitted, from one thread. Writes `path` when its window is over.

    Args:
        marker: a kernel that runs once at the start and once at the end of every step, if there is one.
        loads: counts the steps' loads, for a caller that gives their records to `note()`.
    """

    def __init__(
        self,
        path: Path,
        device: torch.device,
        *,
        marker: str | None = None,
        loads: StepLoads | None = None,
        num_skipped: int = NUM_SKIPPED,
        num_discarded: int = NUM_DISCARDED,
        num_profiled: int = NUM_PROFILED,
    ) -> None:
        self._path = path
        self._marker = marker
        self._num_profiled = num_profiled
        self._step_loads = loads
        self._before = num_skipped + num_discarded
        self._num_steps = 0
        self._loads: list[StepLoad] = []  # of the profiled steps
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

    def note(self, record: StepRecord) -> None:
        """Note what the next step computes, for the report's `load`. Call it before the record may be released."""
        if self._step_loads is None:
            return
        load = self._step_loads.take(record)
        if self._before <= self._num_steps < self._before + self._num_profiled:
            self._loads.append(load)

    def step(self) -> None:
        self._num_steps += 1
        self._profile.step()

    def _write(self, profile: Any) -> None:
        kind = DeviceType.CUDA if self._on_cuda else DeviceType.CPU
        activities = [
            DeviceActivity(event.name, event.time_range.start, event.time_range.end)
            for event in profile.events()
            if event.device_type == kind and not event.is_user_annotation and not event.name.startswith("ProfilerStep")
        ]
        summary = {"num_steps": self._num_profiled, **summarize(activities)}
        if self._loads:
            summary["load"] = {
                "num_seqs": median(load.num_seqs for load in self._loads),
                "num_tokens": median(load.num_tokens for load in self._loads),
                "num_kv_read": median(load.num_kv_read for load in self._loads),
            }
        times = [(a.start_us, a.end_us) for a in activities if a.name == self._marker]
        if times:
            summary["typical_step"] = typical_step(activities, times)
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
    of [name, count, total us, added us] for each name, the longest total first (see `added_us`).
    """
    activities = list(activities)
    if not activities:
        return {"window_us": 0.0, "busy_us": 0.0, "busy_percent": 0.0, "num_activities": 0, "kernels": []}
    totals: dict[str, tuple[int, float, float]] = {}
    for activity, added in added_us(activities):
        count, total_us, sum_us = totals.get(activity.name, (0, 0.0, 0.0))
        totals[activity.name] = (count + 1, total_us + activity.end_us - activity.start_us, sum_us + added)
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


def added_us(activities: Iterable[DeviceActivity]) -> Iterator[tuple[DeviceActivity, float]]:
    """Return each activity, in the order of the starts, with the time that it adds to the device's busy time.

    An activity that starts before an earlier one ends, as kernels of a dependent launch do, counts from there. So the
    times of all activities sum to the busy time.
    """
    reached = float("-inf")
    for activity in sorted(activities, key=lambda a: (a.start_us, -a.end_us)):
        yield activity, max(0.0, activity.end_us - max(activity.start_us, reached))
        reached = max(reached, activity.end_us)


def typical_step(activities: Iterable[DeviceActivity], markers: Iterable[tuple[float, float]]) -> dict[str, Any] | None:
    """Return the kernels of one step in their order, or None if no step is complete.

    `launches` is the most frequent sequence of kernels as [name, us], where us is the median of the time that the
    kernel adds to the step. `num_alike` of `num_steps` steps have that sequence. Copies are left out.
    """
    kernels = [(a, us) for a, us in added_us(activities) if not a.name.startswith(COPIES)]
    steps: list[list[tuple[str, float]]] = []
    for start, end in step_bounds(sorted(markers)):
        steps.append([(a.name, us) for a, us in kernels if start <= a.start_us < end])
    if not steps:
        return None
    ((names, num_alike),) = Counter(tuple(name for name, _ in step) for step in steps).most_common(1)
    alike = [[us for _, us in step] for step in steps if tuple(name for name, _ in step) == names]
    launches = [[name, median(times)] for name, times in zip(names, zip(*alike, strict=True), strict=True)]
    return {"num_steps": len(steps), "num_alike": num_alike, "launches": launches}


def between_steps_us(markers: Iterable[tuple[float, float]]) -> list[float]:
    """Return the times between each step's end and the next step's start, in us.

    `markers` are (start, end) of a kernel that runs at both ends of every step.
    """
    ordered = sorted(markers)
    return _gaps(ordered)[1 - _first_start(ordered) :: 2]


def step_bounds(markers: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return each complete step of sorted `markers`: from its first marker's start to its last marker's end, in us."""
    first = _first_start(markers)
    return [(start, end) for (start, _), (_, end) in zip(markers[first::2], markers[first + 1 :: 2], strict=False)]


def _first_start(markers: Sequence[tuple[float, float]]) -> int:
    """Return the index of the first marker that starts a step: 0 or 1.

    It is unknown where the window began. But steps take longer than the gaps between them, which tells the two cases
    apart.
    """
    gaps = _gaps(markers)
    return 0 if sum(gaps[1::2]) <= sum(gaps[::2]) else 1


def _gaps(markers: Sequence[tuple[float, float]]) -> list[float]:
    return [start - end for (_, end), (start, _) in itertools.pairwise(markers)]


def union_us(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the total time that is covered by at least one of the intervals [start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
