"""The adjustment stage's Triton kernels against the definitions, under Triton's interpreter. Run by
test_triton_kernels.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.reference import adjustment_bench
from tests.reference.adjustment_bench import (
    AdjustmentBench,
    assert_adjusted,
    check_long_thinking,
    check_tiny_repetition_penalty,
)
from tests.reference.triton_interpreter import let_scalars_end_ranges
from workers.gpu.sampling import triton_adjustments

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)  # imported for its effect: unwritten memory holds NaN
let_scalars_end_ranges()


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def adjust(*arguments: Any) -> None:
        triton_adjustments.adjust(*arguments)

    monkeypatch.setattr(adjustment_bench, "adjust", adjust)


@pytest.mark.parametrize("seed", range(10))
def test_each_row_of_a_mixed_step_is_adjusted_as_its_own_parameters_say(seed: int) -> None:
    dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
    assert_adjusted(AdjustmentBench(num_seqs=7, vocab_size=(70, 4100, 31)[seed % 3], seed=seed, dtype=dtype))


def test_a_tiny_repetition_penalty_does_not_look_like_a_failure_of_the_model() -> None:
    check_tiny_repetition_penalty()


def test_the_budget_of_thinking_is_right_however_long_ago_it_began() -> None:
    check_long_thinking()
