"""Statistics of an engine in which every counter has its own value."""

from __future__ import annotations

import itertools

import numpy as np

from ipc.histogram import Histogram
from ipc.stats_page import stats_layout
from pipeline.client.outputs import EngineStats
from pipeline.engine.topology import ENGINE
from workers.detokenizer.config import ARRAYS, END_REASONS, ENDS, HISTOGRAMS


def engine_stats(*, without: tuple[str, ...] = (), **observed: int) -> EngineStats:
    """As `stats_with_arrays(ARRAYS)` returns them, for two processes of each role that may have several.

    `observed`: a value for each of these histograms. Of each finish reason, as many samples ended as its position says.
    """
    numbers = itertools.count(1)
    roles = {}
    for role in ENGINE.roles:
        if role.name not in without:
            names = [role.name] if role.count is None else [f"{role.name}.{index}" for index in range(2)]
            counters = stats_layout(role.name, role.counters).fields.keys() - {"pid"}
            for name in names:
                roles[name] = {counter: float(next(numbers)) for counter in sorted([*counters, "cpu_ns"])}
    arrays = {name: np.zeros(shape, np.int64) for name, shape in ARRAYS}
    arrays[ENDS][:] = np.arange(len(END_REASONS))
    for name, value in observed.items():
        Histogram(HISTOGRAMS[name], arrays[name]).add(value)
    return EngineStats(roles, {"detokenizer": {name: array.data for name, array in arrays.items()}})
