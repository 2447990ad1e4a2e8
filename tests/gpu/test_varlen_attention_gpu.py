"""torch's FlashAttention as a backend, on a GPU at real shapes, and under capture and replay."""

from __future__ import annotations

import pytest
import torch

from ipc.errors import ConfigError
from tests.gpu.attention_steps import LLAMA_8B, STEPS, assert_near, check_replay, lengths_of
from tests.reference.paged_attention import attend, make_paged_step, run_backend
from workers.gpu.attention.backend import AttentionBackend, make_backend
from workers.gpu.config import VARLEN_BLOCK_TOKENS

pytestmark = pytest.mark.gpu


@pytest.fixture
def backend() -> AttentionBackend:
    try:
        return make_backend("varlen", torch.device("cuda"))
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("block_size", [VARLEN_BLOCK_TOKENS, 2 * VARLEN_BLOCK_TOKENS])
@pytest.mark.parametrize("name", STEPS)
def test_steps_of_the_8b_shape_are_right(backend: AttentionBackend, name: str, block_size: int) -> None:
    lengths, num_seqs, num_tokens = lengths_of(name)
    step = make_paged_step(lengths, num_seqs=num_seqs, num_tokens=num_tokens, block_size=block_size, **LLAMA_8B)
    for window in (None, 1, 700):
        result = run_backend(backend, step, scaling=128**-0.5, sliding_window=window)
        assert_near(result, attend(step, scaling=128**-0.5, sliding_window=window))
        assert not result[sum(tokens for tokens, _ in lengths) :].any()


@pytest.mark.parametrize("num_heads", [2, 6, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_every_head_size_dtype_and_group_is_right(
    backend: AttentionBackend, head_dim: int, dtype: torch.dtype, num_heads: int
) -> None:
    lengths, num_seqs, num_tokens = lengths_of("mixed, padded")
    shape = {**LLAMA_8B, "head_dim": head_dim, "dtype": dtype, "num_heads": num_heads, "num_kv_heads": 2}
    step = make_paged_step(lengths, num_seqs=num_seqs, num_tokens=num_tokens, block_size=VARLEN_BLOCK_TOKENS, **shape)
    assert_near(run_backend(backend, step, scaling=0.1), attend(step, scaling=0.1))


@pytest.mark.parametrize("name", ["padded decodes", "mixed, padded"])
def test_a_captured_step_replays_for_other_lengths(backend: AttentionBackend, name: str) -> None:
    check_replay(lambda step, **options: run_backend(backend, step, **options), name, VARLEN_BLOCK_TOKENS)
