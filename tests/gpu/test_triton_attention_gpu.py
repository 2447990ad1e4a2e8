"""Runs the Triton kernels on a GPU at real shapes, and under capture and replay."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.gpu.attention_steps import LLAMA_8B, SCALES, STEPS, assert_near, check_replay, lengths_of
from tests.reference.paged_attention import PLANTS, PagedStep, attend, check_planted, make_paged_step, run_backend

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from workers.gpu.attention.triton_backend import TritonBackend
from workers.gpu.attention.triton_kv_write import write_kv
from workers.gpu.e4m3 import E4M3
from workers.gpu.memory.kv_cache import quantize

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


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("name", STEPS)
def test_steps_of_the_8b_shape_are_right_with_a_cache_of_8_bits(name: str, block_size: int) -> None:
    lengths, num_seqs, num_tokens = lengths_of(name)
    shape = {**LLAMA_8B, "num_seqs": num_seqs, "num_tokens": num_tokens, "block_size": block_size}
    step = make_paged_step(lengths, scales=SCALES, **shape)
    assert_near(run(step, scaling=128**-0.5), attend(step, scaling=128**-0.5))


@pytest.mark.parametrize("name", ["padded decodes", "mixed, padded"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 128, 192, 256])
def test_every_head_size_and_dtype_reads_a_cache_of_8_bits(head_dim: int, dtype: torch.dtype, name: str) -> None:
    lengths, num_seqs, num_tokens = lengths_of(name)
    shape = {**LLAMA_8B, "head_dim": head_dim, "dtype": dtype, "num_seqs": num_seqs, "num_tokens": num_tokens}
    step = make_paged_step(lengths, block_size=16, scales=SCALES, **shape)
    assert_near(run(step, scaling=head_dim**-0.5), attend(step, scaling=head_dim**-0.5))


@pytest.mark.parametrize("name", ["padded decodes", "mixed, padded"])
@pytest.mark.parametrize("group", [1, 7, 16])
def test_windows_soft_caps_and_sinks_hold_with_a_cache_of_8_bits(group: int, name: str) -> None:
    lengths, num_seqs, num_tokens = lengths_of(name)
    shape = {**LLAMA_8B, "num_heads": 2 * group, "num_kv_heads": 2, "num_seqs": num_seqs, "num_tokens": num_tokens}
    step = make_paged_step(lengths, block_size=16, scales=SCALES, **shape)
    sinks = torch.linspace(-2, 4, 2 * group, device="cuda", dtype=torch.bfloat16)
    for options in (
        {"sliding_window": 700},
        {"softcap": 5.0},
        {"sinks": sinks},
        {"sliding_window": 128, "softcap": 5.0, "sinks": sinks},
    ):
        assert_near(run(step, scaling=0.1, **options), attend(step, scaling=0.1, **options))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_nan_in_a_cache_of_8_bits_reaches_the_tokens_that_see_it_and_no_others(head_dim: int) -> None:
    for window in (None, 100):
        num_found = [0, 0]
        for seed, plant_options in enumerate(PLANTS[:3]):
            lengths = [(1, 400), (201, 300), (1, 9), (150, 150), (1, 70), (2, 40)]
            shape = {**LLAMA_8B, "head_dim": head_dim, "block_size": 16, "num_seqs": 8, "num_tokens": 512}
            step = make_paged_step(lengths, seed=seed, scales=SCALES, **shape)
            options = {"scaling": head_dim**-0.5, "sliding_window": window}
            found = check_planted(TritonBackend(), step, {**plant_options, "seed": seed}, 3e-2, **options)
            num_found = [count + more for count, more in zip(num_found, found, strict=True)]
        assert min(num_found) > 10, "this test needs tokens of both kinds"


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_a_query_outside_of_float16_reads_a_cache_of_8_bits(size: float) -> None:
    lengths, num_seqs, num_tokens = lengths_of("mixed, padded")
    shape = {**LLAMA_8B, "num_seqs": num_seqs, "num_tokens": num_tokens, "block_size": 16}
    step = make_paged_step(lengths, scales=SCALES, **shape)
    step = dataclasses.replace(step, query=step.query * size)
    assert_near(run(step, scaling=0.1 / size), attend(step, scaling=0.1 / size))


@pytest.mark.parametrize("name", ["padded decodes", "mixed, padded"])
def test_a_captured_step_with_a_cache_of_8_bits_replays_for_other_lengths(name: str) -> None:
    check_replay(run, name, block_size=16, scales=SCALES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 2])  # a decode, and a prompt whose first token sees itself alone
def test_each_number_of_8_bits_is_read_as_it_is(num_tokens: int, dtype: torch.dtype) -> None:
    shape = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 128, "dtype": dtype, "device": "cuda", "block_size": 16}
    step = make_paged_step([(num_tokens, num_tokens)], scales=(1.0, 1.0), **shape)
    codes = torch.arange(256, dtype=torch.uint8, device="cuda")
    is_number = (codes & 0x7F) != 0x7F
    codes[~is_number] = 0
    step.value_cache.view(torch.uint8).flatten(0, 1)[step.batch.slot_mapping[0]] = codes.view(2, 128)
    torch.testing.assert_close(run(step, scaling=0.1)[0].flatten().float(), codes.view(E4M3).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1.0, 0.3, 1e-4])
def test_every_bfloat16_is_written_in_8_bits_as_torch_rounds_it(scale: float) -> None:
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(64, 8, 128)
    key_cache, value_cache = torch.zeros(2, 5, 16, 8, 128, device="cuda").to(E4M3)
    slots = torch.arange(64, device="cuda")
    write_kv(numbers.cuda(), numbers.cuda(), key_cache, value_cache, slots, 1.0, scale)
    for cache, own_scale in ((key_cache, 1.0), (value_cache, scale)):
        written, expected = cache.flatten(0, 1)[:64].cpu(), quantize(numbers, own_scale)
        assert torch.equal(written.isnan(), ~numbers.isfinite())
        is_number = numbers.isfinite()
        assert torch.equal(written.view(torch.uint8)[is_number], expected.view(torch.uint8)[is_number])
        assert not cache.flatten(0, 1)[64:].view(torch.uint8).any()
