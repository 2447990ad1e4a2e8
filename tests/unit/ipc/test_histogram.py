from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ipc.histogram import Histogram, histogram_arrays, read_histogram

BOUNDS = (10, 20, 50)


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 5)), max_size=20))
def test_every_value_is_in_the_bucket_of_the_lowest_bound_that_it_does_not_exceed(
    values: list[tuple[int, int]],
) -> None:
    [(_, shape)] = histogram_arrays({"h": BOUNDS})
    array = np.zeros(shape, np.int64)
    histogram = Histogram(BOUNDS, array)
    for value, num in values:
        histogram.add(value, num)
    buckets, total = read_histogram(array.tolist())
    cumulated = [sum(buckets[: i + 1]) for i in range(len(buckets))]
    assert cumulated == [sum(n for value, n in values if value <= bound) for bound in (*BOUNDS, 99)]
    assert total == sum(value * n for value, n in values)
