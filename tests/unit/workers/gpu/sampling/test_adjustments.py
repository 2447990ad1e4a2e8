"""The adjustment stage in torch against the definitions, row by row."""

from __future__ import annotations

import pytest
import torch

from tests.reference.adjustment_bench import (
    AdjustmentBench,
    assert_adjusted,
    check_long_thinking,
    check_tiny_repetition_penalty,
)


@pytest.mark.parametrize("seed", range(12))
def test_each_row_of_a_mixed_step_is_adjusted_as_its_own_parameters_say(seed: int) -> None:
    assert_adjusted(AdjustmentBench(num_seqs=9, vocab_size=(70, 333, 31)[seed % 3], seed=seed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_models_logits_of_any_dtype_are_adjusted_in_float32_and_stay_as_they_are(dtype: torch.dtype) -> None:
    bench = AdjustmentBench(num_seqs=7, vocab_size=130, seed=3, dtype=dtype)
    before = bench.logits.clone()
    assert_adjusted(bench)
    assert torch.equal(bench.logits.nan_to_num(), before.nan_to_num())


def test_a_tiny_repetition_penalty_does_not_look_like_a_failure_of_the_model() -> None:
    check_tiny_repetition_penalty()


def test_the_budget_of_thinking_is_right_however_long_ago_it_began() -> None:
    check_long_thinking()
