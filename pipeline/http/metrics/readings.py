"""One reading of the engine's statistics, and the ways in which metrics take values from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from ipc.histogram import read_histogram
from pipeline.client.outputs import EngineStats
from workers.detokenizer.config import ARRAYS as DETOKENIZER_ARRAYS
from workers.detokenizer.config import END_REASONS, ENDS, HISTOGRAMS

ARRAYS: Final = tuple(name for name, _ in DETOKENIZER_ARRAYS)  # what a reading needs of `stats_with_arrays`
NS: Final = 1e-9  # seconds

Sample = tuple[tuple[str, ...], float]  # values of the labels, in the order of the metric's `labels`
Read = Callable[["Reading"], Iterator[Sample]]


class Reading:
    """Statistics by kind of process: "http" stands for "http", "http.0", "http.1" and so on."""

    def __init__(self, stats: EngineStats) -> None:
        self.roles = stats.roles
        self._arrays = stats.arrays.get("detokenizer", {})

    def sum(self, kind: str, counter: str) -> float | None:
        """A counter's sum over the processes of a kind; None if there are none."""
        values = [counters[counter] for role, counters in self.roles.items() if role.split(".")[0] == kind]
        return sum(values) if values else None

    def ends(self) -> dict[str, int]:
        """Samples that ended, by finish reason."""
        return dict(zip(END_REASONS, self._arrays[ENDS].tolist(), strict=True)) if ENDS in self._arrays else {}

    def histogram(self, name: str) -> tuple[list[tuple[float, int]], float] | None:
        """The number of values up to each bound, the last one infinite, and the sum; durations are in seconds."""
        if name not in self._arrays:
            return None
        units = 1_000_000 if name.endswith("_us") else 1  # in one unit of the metric
        buckets, total = read_histogram(self._arrays[name].tolist())
        cumulated, num = [], 0
        for bound, count in zip((*HISTOGRAMS[name], float("inf")), buckets, strict=True):
            num += count
            cumulated.append((bound / units, num))
        return cumulated, total / units


def total(kind: str, counter: str, scale: float = 1.0) -> Read:
    """The sum of a counter over all processes of a kind, without labels."""

    def read(reading: Reading) -> Iterator[Sample]:
        if (value := reading.sum(kind, counter)) is not None:
            yield (), value * scale

    return read


def by_label(kind: str, counters: dict[str, str], scale: float = 1.0) -> Read:
    """Several counters of a kind of process as values of one label: `counters` gives the counter of each value."""

    def read(reading: Reading) -> Iterator[Sample]:
        for label, counter in counters.items():
            if (value := reading.sum(kind, counter)) is not None:
                yield (label,), value * scale

    return read


def by_process(counter: str, scale: float = 1.0) -> Read:
    """A counter that every process has."""

    def read(reading: Reading) -> Iterator[Sample]:
        for role, counters in reading.roles.items():
            yield (role,), counters[counter] * scale

    return read


def restarts(reading: Reading) -> Iterator[Sample]:
    """How often each process was started again."""
    for role, counters in reading.roles.items():
        yield (role,), max(0.0, counters["num_starts"] - 1)


def by_stage(counter: str) -> Read:
    """A counter that gateway and scheduler have, each for the requests of its own queue."""

    def read(reading: Reading) -> Iterator[Sample]:
        for kind in ("gateway", "scheduler"):
            if (value := reading.sum(kind, counter)) is not None:
                yield (kind,), value

    return read


def timeouts(reading: Reading) -> Iterator[Sample]:
    """Requests of the gateway's queue and sequences of the scheduler that ran out of time."""
    for kind in ("gateway", "scheduler"):
        for reason in ("deadline", "queue_timeout"):
            if (value := reading.sum(kind, f"num_{reason}")) is not None:
                yield (reason, kind), value


def ends(reading: Reading) -> Iterator[Sample]:
    """Samples that ended, by finish reason."""
    for reason, count in reading.ends().items():
        yield (reason,), float(count)


def kv_cache_usage(reading: Reading) -> Iterator[Sample]:
    """The share of KV blocks that sequences hold. 0 before the scheduler has its blocks."""
    if (num_blocks := reading.sum("scheduler", "num_blocks")) is not None:
        num_free = reading.sum("scheduler", "num_free_blocks") or 0.0
        yield (), 1 - num_free / num_blocks if num_blocks else 0.0
