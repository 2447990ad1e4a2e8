"""The figures of a restart, from made-up counters and arrivals."""

from __future__ import annotations

import pytest

from pipeline.bench.restart import _TEXTS, Restart
from workers.gpu.startup_stages import COUNTERS

SECOND_NS = 1_000_000_000


def test_the_stages_of_a_restart_add_up_to_the_shortest_pause() -> None:
    stages = [name for name in COUNTERS if "_at_" not in name]
    assert set(stages) == set(_TEXTS), "the benchmark knows every stage"
    counters = dict.fromkeys(COUNTERS, 0.0) | {
        "startup_begun_at_ns": 10.5 * SECOND_NS, "startup_imports_ns": 2.0 * SECOND_NS,
        "startup_weights_ns": 1.5 * SECOND_NS, "startup_ready_at_ns": 14.0 * SECOND_NS,
    }  # fmt: skip
    arrivals = [[9.0, 10.2, 14.5, 14.6], [9.9, 15.0]]  # one token was still on its way when the process died
    found = Restart.of(counters, 10 * SECOND_NS, [[round(at * SECOND_NS) for at in each] for each in arrivals])
    assert found.pauses_s == pytest.approx([4.5, 5.0])
    assert sum(found.stages_s.values()) == pytest.approx(4.5)
    assert found.stages_s["death to the start of a process"] == pytest.approx(0.5)
    assert found.stages_s["ready to the first token"] == pytest.approx(0.5)
