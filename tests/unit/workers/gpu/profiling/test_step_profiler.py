"""The profiler's report: a step's kernels in their order, and the KV that the steps read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ipc.records import StepRecord, StepShape, step_layout
from workers.gpu.profiling.step_loads import StepLoads
from workers.gpu.profiling.step_profiler import DeviceActivity, StepProfiler, added_us, step_bounds, typical_step


def record_of(tokens: dict[int, int], computed: dict[int, int] | None = None) -> StepRecord:
    """A step that computes `tokens` by row, after it has admitted rows with so many computed tokens."""
    layout = step_layout(StepShape(4, 64, 64, 16))
    record = layout.views(memoryview(bytearray(layout.num_bytes)))
    record.num_seqs[0], record.num_tokens[0] = len(tokens), sum(tokens.values())
    record.seq_row[: len(tokens)] = list(tokens)
    record.seq_num_tokens[: len(tokens)] = list(tokens.values())
    admitted = computed or {}
    record.num_admissions[0] = len(admitted)
    record.admit.row[: len(admitted)] = list(admitted)
    record.admit.num_computed_tokens[: len(admitted)] = list(admitted.values())
    return record


def test_a_load_follows_each_row_through_admissions_chunks_and_decodes() -> None:
    loads = StepLoads(4)
    first = loads.take(record_of({2: 5, 0: 7}, computed={2: 16, 0: 0}))
    assert (first.num_seqs, first.num_tokens, first.num_kv_read) == (2, 12, 16 + 5 + 7)
    assert loads.take(record_of({0: 1})).num_kv_read == 8
    assert loads.take(record_of({2: 1, 0: 1})).num_kv_read == 22 + 9
    assert loads.take(record_of({2: 3}, computed={2: 0})).num_kv_read == 3  # another sequence in the row


def test_a_kernel_that_starts_before_another_ends_adds_only_what_follows() -> None:
    outer, inner, last = DeviceActivity("a", 0, 10), DeviceActivity("b", 0, 4), DeviceActivity("c", 8, 15)
    assert [(a.name, us) for a, us in added_us([last, inner, outer])] == [("a", 10), ("b", 0), ("c", 5)]


@pytest.mark.parametrize("skip", [0, 1])
def test_steps_lie_between_pairs_of_markers_wherever_the_window_begins(skip: int) -> None:
    markers = [(0, 1), (100, 101), (104, 105), (200, 201), (202, 203), (300, 301)]
    assert step_bounds(markers[skip:]) == [(0, 101), (104, 201), (202, 301)][skip:]


def test_a_typical_step_has_the_commonest_kernels_and_their_median_times() -> None:
    activities, markers = [], []
    for i, (names, us) in enumerate([("ab", 10), ("ab", 30), ("abc", 50), ("ab", 20)]):
        start = 1000 * i
        markers += [(start, start + 1), (start + 900, start + 901)]
        activities += [DeviceActivity("clock", *times) for times in markers[-2:]]
        activities += [DeviceActivity(n, start + 100 * j, start + 100 * j + us) for j, n in enumerate(names, start=1)]
        activities.append(DeviceActivity("Memcpy HtoD", start + 50 + i, start + 60))  # of another stream
    step = typical_step(activities, markers)
    assert step == {
        "num_steps": 4,
        "num_alike": 3,
        "launches": [["clock", 1], ["a", 20], ["b", 20], ["clock", 1]],
    }
    assert typical_step(activities, markers[:1]) is None


def test_the_report_has_the_median_load_of_the_profiled_steps(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    profiler = StepProfiler(
        path, torch.device("cpu"), loads=StepLoads(4), num_skipped=2, num_discarded=1, num_profiled=3
    )
    for step in range(8):
        profiler.note(record_of({1: 1}, computed={1: 100} if step == 0 else None))
        torch.ones(2).sum()
        profiler.step()
    assert json.loads(path.read_text())["load"] == {"num_seqs": 1, "num_tokens": 1, "num_kv_read": 105}
