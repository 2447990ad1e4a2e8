"""Tracks the stages of start-up and their durations, from the progress reports that the loading code makes anyway."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

STARTING: Final = "starting"  # the interpreter and torch; nothing in a process that was a spare
IMPORTING: Final = "importing transformers"
WAITING_FOR_MEMORY: Final = "waiting for the memory of the former process"
LOADING: Final = "loading weights"
SERVING: Final = "running a step"
# The counter of the statistics page that has a stage's duration. Several stages may share one.
STAGE_COUNTERS: Final = {
    STARTING: "startup_imports_ns",
    IMPORTING: "startup_imports_ns",
    "starting the device": "startup_device_ns",
    WAITING_FOR_MEMORY: "startup_memory_ns",
    "reading config.json": "startup_check_ns",
    LOADING: "startup_weights_ns",
    "checking the model": "startup_check_ns",
    "tuning products": "startup_compile_ns",
    "compiling the model": "startup_compile_ns",
    "measuring the largest step": "startup_compile_ns",
    "allocating the KV cache": "startup_tables_ns",
    "allocating tables": "startup_tables_ns",
    "capturing graphs": "startup_graphs_ns",
}
COUNTERS: Final = ("startup_begun_at_ns", *dict.fromkeys(STAGE_COUNTERS.values()), "startup_ready_at_ns")
_GIB: Final = 1 << 30


class Stages:
    """The current stage: one of start-up, then SERVING. Passes each `progress` on to `report`.

    The first stage, STARTING, began at `begun_at_ns` of `clock`, which returns ns; None = it begins now.
    """

    def __init__(
        self,
        report: Callable[[str, float, int], None],
        begun_at_ns: int | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._report = report
        self._clock = clock
        self._durations: dict[str, int] = {}
        self._since_ns = clock() if begun_at_ns is None else begun_at_ns
        self.begun_at_ns = self._since_ns
        self.name = STARTING
        self._far = ""

    def progress(self, stage: str, fraction: float, total_bytes: int = 0) -> None:
        self._enter(stage)
        self._far = f", {fraction:.0%}{f' of {total_bytes / _GIB:.2f} GiB' if total_bytes else ''} done"
        self._report(stage, fraction, total_bytes)

    def serve(self) -> None:
        """Enter the stage SERVING: start-up is over."""
        self._enter(SERVING)
        self._far = ""

    def __str__(self) -> str:
        """The stage and its progress: "loading weights, 40% of 14.96 GiB done"."""
        return self.name + self._far

    @property
    def total_s(self) -> float:
        """Seconds of all finished stages."""
        return (self._since_ns - self.begun_at_ns) * 1e-9

    def durations(self) -> str:
        """The finished stages that took at least 0.1 s: "loading weights 2.1 s, checking the model 0.3 s"."""
        seconds = {name: round(duration * 1e-9, 1) for name, duration in self._durations.items()}
        return ", ".join(f"{name} {duration} s" for name, duration in seconds.items() if duration)

    def count(self, stats: Any) -> None:
        """Write the durations of the finished stages to the statistics page, and when they began and ended."""
        durations = dict.fromkeys(STAGE_COUNTERS.values(), 0)
        for name, duration in self._durations.items():
            durations[STAGE_COUNTERS[name]] += duration
        for counter, duration in durations.items():
            getattr(stats, counter)[0] = duration
        stats.startup_begun_at_ns[0] = self.begun_at_ns
        stats.startup_ready_at_ns[0] = self._since_ns

    def _enter(self, stage: str) -> None:
        now_ns = self._clock()
        self._durations[self.name] = self._durations.get(self.name, 0) + now_ns - self._since_ns
        self._since_ns = now_ns
        self.name = stage
