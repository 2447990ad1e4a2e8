"""Steps of real shapes for attention backends on a GPU, and what each backend has to make of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from tests.reference.paged_attention import attend, make_paged_step

LLAMA_8B = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "dtype": torch.bfloat16, "device": "cuda"}
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}  # of the norm of the difference


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


SCALES = (0.02, 3.0)  # of a cache of 8 bits: K of a normal distribution fills the format's range, V does not


def check_replay(
    run: Callable[..., torch.Tensor], name: str, block_size: int, scales: tuple[float, float] | None = None
) -> None:
    """Capture `run(step, scaling=...)` on an empty batch and replay it for others of the bucket.

    A value that the host read during the capture would be wrong in the replay.
    """
    lengths, num_seqs, num_tokens = lengths_of(name)
    shape = {**LLAMA_8B, "num_seqs": num_seqs, "num_tokens": num_tokens, "block_size": block_size, "scales": scales}
    steps = [
        make_paged_step(some, seed=seed, **shape) for seed, some in enumerate([lengths, lengths[::-1], lengths[:3]])
    ]
    max_blocks = max(step.batch.block_table.shape[1] for step in steps)
    max_cache = max(step.key_cache.shape[0] for step in steps)
    fixed = make_paged_step([], **shape)
    fixed = dataclasses.replace(
        fixed,
        batch=dataclasses.replace(
            fixed.batch, block_table=torch.zeros(num_seqs + 1, max_blocks, dtype=torch.int32, device="cuda")
        ),
        key_cache=_nan_like(fixed.key_cache, max_cache),
        value_cache=_nan_like(fixed.value_cache, max_cache),
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


def _nan_like(cache: torch.Tensor, num_blocks: int) -> torch.Tensor:
    return torch.full((num_blocks, *cache.shape[1:]), torch.nan, device="cuda").to(cache.dtype)
