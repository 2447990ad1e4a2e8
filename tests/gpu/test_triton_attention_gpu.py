"""Runs the Triton kernels on a GPU at real shapes, and under capture and replay."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.gpu.attention_steps import LLAMA_8B, STEPS, assert_near, check_replay, lengths_of
from tests.reference.paged_attention import PLANTS, PagedStep, attend, check_planted, make_paged_step, run_backend

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from workers.gpu.attention.triton_backend import TritonBackend
from workers.gpu.attention.triton_kv_write import write_kv

pytestmark = pytest.mark.gpu


def run(step: PagedStep, **options: Any) -> torch.Tensor:
    return run_backend(TritonBackend(), step, **options)


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("name", STEPS)
def test_steps_of_the_8b_shape_are_right(name: str, block_size: int) -> None:
    lengths, num_seqs, num_tokens = lengths_of(name)
    step = make_paged_step(lengths, num_seqs=num_seqs, num_tokens=num_tokens, block_size=block_size, **LLAMA_8B)
    assert_near(run(step, scaling=128**-0.5), attend(step, scaling=128**-0.5))


@pytest.mark.parametrize("name", ["padded decodes", "mixed, padded"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_every_head_size_and_dtype_fits_the_device(head_dim: int, dtype: torch.dtype, name: str) -> None:
    lengths, num_seqs, num_tokens = lengths_of(name)
    shape = {**LLAMA_8B, "head_dim": head_dim, "dtype": dtype}
    step = make_paged_step(lengths, num_seqs=num_seqs, num_tokens=num_tokens, block_size=16, **shape)
    assert_near(run(step, scaling=head_dim**-0.5), attend(step, scaling=head_dim**-0.5))


@pytest.mark.parametrize("name", ["padded decodes", "mixed, padded"])
@pytest.mark.parametrize("group", [1, 3, 7, 8, 16])
def test_groups_windows_soft_caps_and_sinks(group: int, name: str) -> None:
    lengths, num_seqs, num_tokens = lengths_of(name)
    shape = {**LLAMA_8B, "num_heads": 2 * group, "num_kv_heads": 2}
    step = make_paged_step(lengths, num_seqs=num_seqs, num_tokens=num_tokens, block_size=16, **shape)
    sinks = torch.linspace(-2, 4, 2 * group, device="cuda", dtype=torch.bfloat16)
    for options in (
        {"sliding_window": 700},
        {"softcap": 5.0},
        {"sinks": sinks},
        {"sliding_window": 128, "sinks": sinks},
    ):
        assert_near(run(step, scaling=0.1, **options), attend(step, scaling=0.1, **options))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_is_not_finite_reaches_the_tokens_that_see_it_and_no_others(dtype: torch.dtype, head_dim: int) -> None:
    shape = {**LLAMA_8B, "dtype": dtype, "head_dim": head_dim, "block_size": 16}
    for window in (None, 100):
        num_found = [0, 0]
        for seed, plant_options in enumerate(PLANTS):
            lengths = [(1, 400), (201, 300), (1, 9), (150, 150), (1, 70), (2, 40)]
            step = make_paged_step(lengths, num_seqs=8, num_tokens=512, seed=seed, **shape)
            options = {"scaling": head_dim**-0.5, "sliding_window": window}
            found = check_planted(TritonBackend(), step, {**plant_options, "seed": seed}, 3e-2, **options)
            num_found = [count + more for count, more in zip(num_found, found, strict=True)]
        assert min(num_found) > 10, "this test needs tokens of both kinds"


@pytest.mark.parametrize("name", ["padded decodes", "mixed, padded"])
def test_a_captured_step_replays_for_other_lengths(name: str) -> None:
    check_replay(run, name, block_size=16)


def test_kv_is_written_where_the_slot_mapping_says() -> None:
    step = make_paged_step([(300, 400), (1, 30)], num_seqs=4, num_tokens=512, block_size=16, **LLAMA_8B)
    key, value = torch.randn(2, 8, 512, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    key_cache, value_cache = step.key_cache.clone(), step.value_cache.clone()
    write_kv(key, value, key_cache, value_cache, step.batch.slot_mapping)
    step.key_cache.flatten(0, 1)[step.batch.slot_mapping[:301]] = key[:301]
    step.value_cache.flatten(0, 1)[step.batch.slot_mapping[:301]] = value[:301]
    torch.testing.assert_close(key_cache[:-1], step.key_cache[:-1], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(value_cache[:-1], step.value_cache[:-1], rtol=0, atol=0, equal_nan=True)
