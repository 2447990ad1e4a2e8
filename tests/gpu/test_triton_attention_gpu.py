"""The Triton kernels on a GPU at real shapes, and under capture and replay."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.reference.paged_attention import PagedStep, attend, make_paged_step

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from workers.gpu.attention.triton_backend import TritonBackend
from workers.gpu.attention.triton_kv_write import write_kv

pytestmark = pytest.mark.gpu
LLAMA_8B = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "dtype": torch.bfloat16, "device": "cuda"}
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}  # of the norm of the difference


def run(
    step: PagedStep,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    return TritonBackend().begin_step(step.batch)(
        step.query,
        step.key_cache,
        step.value_cache,
        scaling=scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=sinks,
    )


def assert_near(result: torch.Tensor, expected: torch.Tensor) -> None:
    assert result.isfinite().all()
    error = (result.double() - expected.double()).norm() / expected.double().norm()
    assert error < TOLERANCE[result.dtype], f"relative error {error:.2e}"
    # One wrong row among thousands would not show in the norm of all.
    row_error = (result.double() - expected.double()).norm(dim=-1) / (expected.double().norm(dim=-1) + 1e-2)
    assert row_error.max() < 8 * TOLERANCE[result.dtype], f"relative error {row_error.max():.2e} of the worst row"


def lengths_of(name: str) -> tuple[list[tuple[int, int]], int, int]:
    """Lengths, S and T."""
    random = torch.Generator().manual_seed(1)
    many = torch.randint(1, 8193, (32,), generator=random).tolist()
    return {
        "decodes": ([(1, length) for length in many], 32, 32),
        "one long decode": ([(1, 8192)], 1, 1),
        "padded decodes": ([(1, length) for length in many[:19]], 32, 32),
        "mixed": ([(1, length) for length in many[:30]] + [(481, 481 + 3000)], 32, 512),
        "mixed, padded": ([(200, 200), *((1, length) for length in many[:9]), (33, 1000), (2, 2)], 32, 256),
        "prefill": ([(2048, 2048)], 1, 2048),
        "several prefills": ([(700, 700), (129, 4000), (1000, 1000)], 4, 2048),
    }[name]


STEPS = [
    "decodes",
    "one long decode",
    "padded decodes",
    "mixed",
    "mixed, padded",
    "prefill",
    "several prefills",
]


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


@pytest.mark.parametrize("name", ["padded decodes", "mixed, padded"])
def test_a_captured_step_replays_for_other_lengths(name: str) -> None:
    """Captured on an empty batch: whatever was read on the host then would be wrong later."""
    lengths, num_seqs, num_tokens = lengths_of(name)
    steps = [
        make_paged_step(some, num_seqs=num_seqs, num_tokens=num_tokens, block_size=16, seed=seed, **LLAMA_8B)
        for seed, some in enumerate([lengths, lengths[::-1], lengths[:3]])
    ]
    max_blocks = max(step.batch.block_table.shape[1] for step in steps)
    max_cache = max(step.key_cache.shape[0] for step in steps)
    fixed = make_paged_step([], num_seqs=num_seqs, num_tokens=num_tokens, block_size=16, **LLAMA_8B)
    fixed = dataclasses.replace(
        fixed,
        batch=dataclasses.replace(
            fixed.batch, block_table=torch.zeros(num_seqs + 1, max_blocks, dtype=torch.int32, device="cuda")
        ),
        key_cache=torch.full((max_cache, *fixed.key_cache.shape[1:]), torch.nan, device="cuda", dtype=torch.bfloat16),
        value_cache=torch.full((max_cache, *fixed.key_cache.shape[1:]), torch.nan, device="cuda", dtype=torch.bfloat16),
    )
    run(fixed, scaling=0.1)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(fixed, scaling=0.1)
    for step in [*steps, steps[0]]:
        for name_of_field in ("cu_seqlens", "seq_lens", "seq_row"):
            getattr(fixed.batch, name_of_field).copy_(getattr(step.batch, name_of_field))
        fixed.batch.block_table[:, : step.batch.block_table.shape[1]] = step.batch.block_table
        fixed.key_cache[: len(step.key_cache)] = step.key_cache
        fixed.value_cache[: len(step.value_cache)] = step.value_cache
        fixed.query.copy_(step.query)
        result.fill_(torch.nan)
        graph.replay()
        assert_near(result, attend(step, scaling=0.1))


def test_kv_is_written_where_the_slot_mapping_says() -> None:
    step = make_paged_step([(300, 400), (1, 30)], num_seqs=4, num_tokens=512, block_size=16, **LLAMA_8B)
    key, value = torch.randn(2, 8, 512, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    key_cache, value_cache = step.key_cache.clone(), step.value_cache.clone()
    write_kv(key, value, key_cache, value_cache, step.batch.slot_mapping)
    step.key_cache.flatten(0, 1)[step.batch.slot_mapping[:301]] = key[:301]
    step.value_cache.flatten(0, 1)[step.batch.slot_mapping[:301]] = value[:301]
    torch.testing.assert_close(key_cache[:-1], step.key_cache[:-1], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(value_cache[:-1], step.value_cache[:-1], rtol=0, atol=0, equal_nan=True)
