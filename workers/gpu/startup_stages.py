"""Tracks the stages of start-up and their durations, from the progress reports that the loading code makes anyway."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

LOADING: Final = "loading weights"
SERVING: Final = "running a step"
_GIB: Final = 1 << 30


class Stages:
    """The current stage: one of start-up, then SERVING. Passes each `progress` on to `report`. `clock` returns ns."""

    def __init__(self, report: Callable[[str, float, int], None], clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._report = report
        self._clock = clock
        self._durations: dict[str, int] = {}
        self._since_ns = clock()
        self.name = "starting"
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

    def durations(self) -> str:
        """The finished stages that took at least 0.1 s: "loading weights 2.1 s, checking the model 0.3 s"."""
        seconds = {name: round(duration * 1e-9, 1) for name, duration in self._durations.items()}
        return ", ".join(f"{name} {duration} s" for name, duration in seconds.items() if duration)

    def _enter(self, stage: str) -> None:
        now_ns = self._clock()
        self._durations[self.name] = self._durations.get(self.name, 0) + now_ns - self._since_ns
        self._since_ns = now_ns
        self.name = stage
