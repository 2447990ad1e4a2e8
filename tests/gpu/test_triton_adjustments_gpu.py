"""The adjustment stage's kernels on a GPU against the definitions: at real vocabularies, under capture and replay."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.reference.adjustment_bench import (
    AdjustmentBench,
    assert_adjusted,
    check_long_thinking,
    check_tiny_repetition_penalty,
)
from workers.gpu.sampling.adjustments import adjust

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(scope="module")
def device() -> Any:
    from workers.gpu.device.cuda import CudaDevice

    return CudaDevice()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [99, 32_000, 128_256])
@pytest.mark.parametrize("seed", [0, 1])
def test_each_row_of_a_mixed_step_is_adjusted_as_its_own_parameters_say(
    seed: int, vocab_size: int, dtype: torch.dtype, device: Any
) -> None:
    assert_adjusted(AdjustmentBench(9, vocab_size, seed, device, dtype))


def test_a_captured_stage_adjusts_what_is_in_the_tables_when_it_runs(device: Any) -> None:
    bench = AdjustmentBench(9, 50_257, 5, device, torch.bfloat16)
    first = bench.run()
    stream = device.stream("adjust")
    with torch.cuda.stream(stream):
        captured = device.capture(
            lambda: adjust(bench.logits, bench.batch, bench.tables, bench.step, bench.masks, bench.out)
        )
        bench.out.fill_(7.0)
        captured()
        device.settle()
        assert torch.equal(bench.out.cpu().nan_to_num(), first.nan_to_num())
        bench.tables.long_columns.zero_()
        bench.tables.repetition_penalty.fill_(2.0)
        again = bench.run()
        bench.out.fill_(7.0)
        captured()
        device.settle()
    assert torch.equal(bench.out.cpu().nan_to_num(), again.nan_to_num())
    assert not torch.equal(again.nan_to_num(), first.nan_to_num())


def test_a_tiny_repetition_penalty_does_not_look_like_a_failure_of_the_model(device: Any) -> None:
    check_tiny_repetition_penalty(device)


def test_the_budget_of_thinking_is_right_however_long_ago_it_began(device: Any) -> None:
    check_long_thinking(device)
