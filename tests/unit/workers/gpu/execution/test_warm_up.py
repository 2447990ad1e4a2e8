"""Warming up: everything that serving captures runs once, and nothing that serving reads has changed."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import torch

from ipc.record_layout import field_names
from ipc.records import StepShape
from tests.reference.executor_engine import executor_engine
from tests.simulation.harness import ToyModel
from tests.simulation.test_step_protocol import expected_tokens, greedy_requests
from workers.gpu.device.cpu import CpuDevice
from workers.gpu.execution.buckets import Buckets
from workers.gpu.execution.row_tables import RowTables

SHAPE = StepShape(max_num_seqs=3, max_num_batched_tokens=12, max_model_len=24, block_size=4)
NUM_BLOCKS = 12

torch.set_num_threads(1)


def test_warming_up_changes_no_row_and_steps_are_right_after_it() -> None:
    buckets = Buckets(SHAPE)
    shares: list[float] = []
    with executor_engine(CpuDevice(), ToyModel(SHAPE, NUM_BLOCKS), SHAPE, 2, NUM_BLOCKS, buckets) as engine:
        tables = engine.executor.tables
        names = (*field_names(RowTables), "token_ids")
        before = {name: getattr(tables, name)[: tables.trash_row].clone() for name in names}
        engine.executor.warm_up(shares.append)
        for name in names:
            assert torch.equal(getattr(tables, name)[: tables.trash_row], before[name]), f"{name} of a row was written"
        assert (tables.block_table == tables.trash_block).all()
        assert tables.num_computed_tokens[tables.trash_row] == 0, "padding sequences have a length"

        requests = greedy_requests(Random(3))
        for request in requests:
            request.ring = 0
        tokens = engine.run(requests)
        assert engine.buckets_run <= set(buckets.captured)
    assert tokens == [expected_tokens(request) for request in requests]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


class CountingDevice(CpuDevice):
    num_captured = 0

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.num_captured += 1
        return work


def test_no_step_waits_for_a_capture_after_warming_up() -> None:
    device, buckets = CountingDevice(), Buckets(SHAPE)
    buckets.captured = [(1, 1), (2, 2)]  # steps of three sequences are too large to be captured, as ones of 600 may be
    with executor_engine(device, ToyModel(SHAPE, NUM_BLOCKS), SHAPE, 2, NUM_BLOCKS, buckets) as engine:
        engine.executor.warm_up(lambda _: None)
        num_captured = device.num_captured
        requests = greedy_requests(Random(3))
        for request in requests:
            request.ring = 0
        engine.run(requests)
        assert any(num_seqs > 2 for num_seqs, _ in engine.buckets_run)
        assert device.num_captured == num_captured
