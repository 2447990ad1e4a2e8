"""What a row keeps on the device follows from one declaration: buffers, admissions, accesses and reserved bytes."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Annotated
from unittest.mock import patch

import pytest
import torch

from ipc.record_layout import int32
from ipc.records import StepShape, step_layout
from tests.reference.step_records import Reference, fill_step
from tests.simulation.harness import Simulation, ToyModel
from tests.simulation.scripted import ScriptedScheduler
from tests.simulation.simulated_device import SimulatedDevice
from tests.simulation.test_step_protocol import Blinkered, expected_tokens, greedy_requests
from workers.gpu.device.cpu import CpuDevice
from workers.gpu.execution import executor as executor_module
from workers.gpu.execution.batch_builder import BatchBuilder
from workers.gpu.execution.row_state import Rebuild, RowState
from workers.gpu.execution.row_tables import RowTables, table_bytes
from workers.gpu.execution.step_batch import StepBatch
from workers.gpu.execution.tensor_views import StepTensors, tensor_views

SHAPE = StepShape(max_num_seqs=3, max_num_batched_tokens=12, max_model_len=24, block_size=4)
NUM_BLOCKS = 12
VOCAB_SIZE = ToyModel.vocab_size
STEPS = step_layout(SHAPE)

torch.set_num_threads(1)


def sum_of_ids(state: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor, _: StepTensors) -> None:
    state.index_copy_(0, rows, token_ids.index_select(0, rows).sum(-1, dtype=torch.int32))


class TablesWithStates(RowTables):
    """Two states that a sampler might keep: one is reset, the other computed anew from the row's ids."""

    counts: Annotated[torch.Tensor, int32("vocab_size")]
    ids_sum: Annotated[torch.Tensor, int32(), Rebuild(sum_of_ids)]


class SumsInARowState(ToyModel):
    """The toy model as a recurrence: it keeps the sum over a row's context, which the toy reads from its cache."""

    row_states: Sequence[RowState] = (RowState("context", (), torch.int64),)

    def logits(self, batch: StepBatch, *, out: torch.Tensor | None = None) -> torch.Tensor:
        context, terms = batch.row_states["context"], (batch.input_ids * 40_503 + 1) * (2 * batch.positions + 1)
        ends = torch.cat((torch.zeros(1, dtype=torch.int64), terms.cumsum(0)))[batch.cu_seqlens.to(torch.int64)]
        context.index_add_(0, batch.seq_row, ends.diff())
        sums = context.index_select(0, batch.seq_row)[:, None]
        return torch.div(((sums & 0xFFFFFF) * self._factors >> 7) & 1023, 256, out=out)


def is_right(seed: int, model: ToyModel, device: type[SimulatedDevice] = SimulatedDevice) -> bool:
    """Run a few requests, some of them preempted and resumed, on the simulated device."""
    simulation = Simulation(
        seed, SHAPE, 2, NUM_BLOCKS, model, num_tokenizers=0, device=device, pad_batches=seed % 2 == 1
    )
    scheduler = ScriptedScheduler(simulation.random, SHAPE, NUM_BLOCKS, simulation.prompt_rings)
    requests = greedy_requests(Random(seed))
    for request in requests:
        request.ring = 0
    scheduler.waiting.extend(requests)
    try:
        simulation.run(scheduler, lambda: scheduler.is_idle)
    finally:
        simulation.close()
    return all(request.tokens == expected_tokens(request) for request in requests)


def test_an_admission_resets_or_rebuilds_the_states_of_its_rows_and_of_no_other_row() -> None:
    state = RowState("wide", (2, 3), torch.float16, fill=0.5)
    tables = TablesWithStates(CpuDevice(), SHAPE, NUM_BLOCKS, VOCAB_SIZE, [state])
    wide = tables.model_states["wide"]
    assert tables.counts.shape == (4, VOCAB_SIZE)
    assert (wide == 0.5).all()
    tables.token_ids.copy_(torch.arange(4 * 24).view(4, 24))
    for tensor in (tables.counts, tables.ids_sum, wide):
        tensor.fill_(7)
    record = torch.zeros(STEPS.num_bytes, dtype=torch.uint8)
    step = tensor_views(StepTensors, STEPS, record)
    fill_step(step, Random(1), Reference(SHAPE, NUM_BLOCKS), [2, 0])
    BatchBuilder(CpuDevice(), tables, step).admit()
    assert tables.counts[:3].any(-1).tolist() == [False, True, False]
    assert wide[:3, 0, 0].tolist() == [0.5, 7, 0.5]
    assert tables.ids_sum[:3].tolist() == [sum(range(24)), 7, sum(range(48, 72))]


@pytest.mark.parametrize("states", [(), (RowState("a", (5,), torch.bfloat16), RowState("b", (), torch.int64))])
def test_the_bytes_that_are_reserved_are_those_that_are_allocated(states: Sequence[RowState]) -> None:
    tables = RowTables(CpuDevice(), SHAPE, NUM_BLOCKS, VOCAB_SIZE, states)
    allocated = [tables.token_ids, tables.columns, tables.long_memory, *tables.model_states.values()]
    assert table_bytes(SHAPE, VOCAB_SIZE, states) == sum(tensor.nbytes for tensor in allocated)


def test_a_model_with_a_row_state_gives_the_same_tokens_and_touches_only_what_is_declared() -> None:
    for seed in range(20):
        assert is_right(seed, SumsInARowState(SHAPE, NUM_BLOCKS), Blinkered if seed < 6 else SimulatedDevice), seed


def test_a_row_state_that_admissions_leave_as_it_is_gives_wrong_tokens() -> None:
    model = SumsInARowState(SHAPE, NUM_BLOCKS)
    model.row_states = (RowState("context", (), torch.int64, rebuild=lambda *_: None),)
    assert not all(is_right(seed, model) for seed in range(10))


def test_columns_beside_the_admitted_ones_need_no_word_in_the_executor() -> None:
    with patch.object(executor_module, "RowTables", TablesWithStates):
        for seed in range(4):
            assert is_right(seed, ToyModel(SHAPE, NUM_BLOCKS), Blinkered)
