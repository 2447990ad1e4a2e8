"""A device whose work takes made-up time and no CPU. It measures the host's side of overlap without a GPU.

Work runs when it is enqueued, as on the CPU, but each stream keeps a timeline on which it *counts* as running:

    host    |enqueue k|enqueue k+1|                    |enqueue k+2|
    stream  |======== step k ========|==== step k+1 ====|  idle    |==== step k+2 ====|
                                     ^ step_done[k]     ^ step_done[k+1]

Work begins when it has been enqueued and the work in front of it has ended. An event fires when the wall clock reaches
the end of the work that was enqueued before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from workers.gpu.device.base import Accesses
from workers.gpu.device.cpu import CpuDevice


class Timeline:
    """A stream, and the time until which it is busy, CLOCK_MONOTONIC in ns."""

    def __init__(self) -> None:
        self.busy_until_ns = 0


class Moment:
    """An event, and the time at which it fires, CLOCK_MONOTONIC in ns."""

    def __init__(self) -> None:
        self.fires_at_ns = 0


class TimedDevice(CpuDevice):
    """See Device. Streams are timelines, and events are moments on them. Only `spend` makes time pass."""

    def __init__(self) -> None:
        self._running_on = Timeline()

    def stream(self, name: str) -> Any:
        return Timeline()

    def event(self, name: str) -> Any:
        return Moment()

    def spend(self, duration_ns: int) -> None:
        """Keep the current stream busy for `duration_ns`. Call it from within launched work."""
        self._running_on.busy_until_ns += duration_ns

    def launch(self, stream: Timeline, work: Callable[[], None], accesses: Callable[[], Accesses]) -> None:
        self._running_on = stream
        work()

    def read_clock(self, stream: Timeline, target: torch.Tensor) -> None:
        stream.busy_until_ns = max(stream.busy_until_ns, time.monotonic_ns())
        target.fill_(stream.busy_until_ns)

    def record(self, event: Moment, stream: Timeline) -> None:
        event.fires_at_ns = max(stream.busy_until_ns, time.monotonic_ns())

    def wait(self, stream: Timeline, event: Moment) -> None:
        stream.busy_until_ns = max(stream.busy_until_ns, event.fires_at_ns)

    def query(self, event: Moment) -> bool:
        return time.monotonic_ns() >= event.fires_at_ns

    def synchronize(self, event: Moment) -> None:
        while (left_ns := event.fires_at_ns - time.monotonic_ns()) > 0:
            time.sleep(left_ns * 1e-9)
