"""A histogram of integers in one array of a statistics page.

The array has the number of values in each bucket, from the lowest bucket to the one above all bounds, and then the sum
of all values. A value that equals a bound belongs to the bucket below it, as in Prometheus.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from ipc.record_layout import HostArray
from ipc.stats_page import ArrayShapes

Bounds = tuple[int, ...]  # ascending


def histogram_arrays(histograms: Mapping[str, Bounds]) -> ArrayShapes:
    """The arrays of a page that hold these histograms."""
    return tuple((name, (len(bounds) + 2,)) for name, bounds in histograms.items())


class Histogram:
    """The writer of one histogram. `array`: int64, of the shape that `histogram_arrays` gives."""

    def __init__(self, bounds: Bounds, array: HostArray) -> None:
        assert array.shape == (len(bounds) + 2,), f"{len(bounds)} bounds do not fit an array of shape {array.shape}"
        self._bounds = bounds
        self._array = array

    def add(self, value: int, num: int = 1) -> None:
        """Count `num` occurrences of a value."""
        self._array[bisect_left(self._bounds, value)] += num
        self._array[-1] += value * num


def read_histogram(values: Sequence[int]) -> tuple[list[int], int]:
    """The number of values in each bucket, and the sum of all values."""
    return list(values[:-1]), values[-1]
