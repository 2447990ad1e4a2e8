"""Counters that any process may read and one writes: a page of shared 64-bit integers per worker.

An update of a counter is one memory store and never waits. To add a metric: a name in
`COUNTERS` of the role's `config.py`, and the line that counts. Names of durations end in `_ns`; all others are counts
or gauges, and begin with `num_`. The reader gets CPU time from the kernel, so a writer that is too busy to update its
page still shows its CPU time.

A page may also have arrays of integers, such as histograms. The role's `config.py` gives their names and shapes. A
reader that copies an array while its writer updates it may see a part of the update.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

import msgspec

from ipc.record_layout import HostArray, Layout
from ipc.shared_memory import create_segment, map_segment

# The writer's pid; how many processes have been the writer, one after the other; their wake-ups from poll; garbage
# collections after loading; objects in cycles that these found.
_COMMON: Final = ("pid", "num_starts", "num_wakeups", "num_collections", "num_garbage")

ArrayShapes = tuple[tuple[str, tuple[int, ...]], ...]
"""Name and shape of each array of a page."""


class StatsHandle(msgspec.Struct, frozen=True):
    """One worker's page."""

    role: str  # "gateway", "tokenizer.0", ...
    fd: int
    counters: tuple[str, ...]  # in addition to those that every page has
    arrays: ArrayShapes = ()


class Counters:
    """The counters of a role, each an array [1] int64, and its arrays, int64 of their declared shapes.

    The first use of an unknown name raises AttributeError.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> HostArray: ...


class StatsPage:
    """A mapped page; `values.<counter>[0]` reads or, in its one writer, writes a counter."""

    def __init__(self, handle: StatsHandle) -> None:
        self.role = handle.role
        self.layout = stats_layout(handle.role, handle.counters, handle.arrays)
        self._arrays = frozenset(name for name, _ in handle.arrays)
        self._map = map_segment(handle.fd)
        self.values = self.layout.views(memoryview(self._map))
        self._cpu_ns = 0

    @staticmethod
    def create(role: str, counters: tuple[str, ...], arrays: ArrayShapes = ()) -> StatsHandle:
        """Make the segment. Its descriptor is the caller's to close. Raises RingError if there is no memory for it."""
        fd = create_segment(f"ringfeed-stats-{role}", stats_layout(role, counters, arrays).num_bytes)
        return StatsHandle(role, fd, counters, arrays)

    def snapshot(self) -> dict[str, float]:
        """All counters, and `cpu_ns`, the CPU time of the process that writes them."""
        counters = (name for name in self.layout.fields if name not in self._arrays)
        values = {name: float(getattr(self.values, name)[0]) for name in counters}
        if pid := int(values.pop("pid")):
            with contextlib.suppress(OSError):  # it has ended
                self._cpu_ns = time.clock_gettime_ns(_cpu_clock(pid))
        else:  # the next writer has not begun
            self._cpu_ns = 0
        return {"cpu_ns": float(self._cpu_ns), **values}

    def clear(self) -> None:
        """Set everything to zero but the number of starts. The page has no writer: the last one is dead."""
        num_starts = int(self.values.num_starts[0])
        self._map[:] = bytes(len(self._map))
        self.values.num_starts[0] = num_starts

    def copy_arrays(self, names: Iterable[str]) -> dict[str, HostArray]:
        """Copies of those arrays, int64, that this page has; it ignores other names."""
        return {name: getattr(self.values, name).copy() for name in self._arrays.intersection(names)}


def stats_layout(role: str, counters: tuple[str, ...], arrays: ArrayShapes = ()) -> Layout[Counters]:
    """The layout of a role's page: the common counters, the role's own, and its arrays."""
    fields = [(name, "<i8", (1,)) for name in (*_COMMON, *counters)]
    return Layout(f"stats.{role}", [*fields, *((name, "<i8", shape) for name, shape in arrays)], Counters)


def _cpu_clock(pid: int) -> int:
    """What clock_getcpuclockid(3) gives for a process."""
    return (~pid << 3) | 2
