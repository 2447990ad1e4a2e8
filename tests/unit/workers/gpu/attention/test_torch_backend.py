"""The torch backend against attention written token by token, in double precision."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from ipc.errors import ConfigError
from tests.reference.packed_steps import PackedSequence, make_batch
from tests.reference.paged_attention import PLANTS, check_planted, make_paged_step
from workers.gpu.attention.backend import make_backend
from workers.gpu.execution.step_batch import StepBatch
from workers.gpu.memory.kv_cache import quantize

BLOCK_SIZE = 4
NUM_BLOCKS = 400
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM_K, HEAD_DIM_V = 6, 2, 16, 8
SCALING = 0.3


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def attend_token_by_token(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch: StepBatch,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """[T, heads, head_dim_v] float64, by the definition; zero for padding tokens."""
    output = torch.zeros(*query.shape[:2], value_cache.shape[-1], dtype=torch.float64)
    for i in range(batch.num_seqs):
        start, end = int(batch.cu_seqlens[i]), int(batch.cu_seqlens[i + 1])
        for token in range(start, end):
            position = int(batch.seq_lens[i]) - (end - token)
            first = 0 if window is None else max(0, position - window + 1)
            seen = torch.arange(first, position + 1)
            blocks = batch.block_table[int(batch.seq_row[i])].long()[seen // batch.block_size]
            keys = key_cache[blocks, seen % batch.block_size].double()  # [L, kv_heads, head_dim]
            values = value_cache[blocks, seen % batch.block_size].double()
            for head in range(query.shape[1]):
                kv_head = head * key_cache.shape[2] // query.shape[1]
                scores = keys[:, kv_head] @ query[token, head].double() * SCALING
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    scores = torch.cat([scores, sinks[head : head + 1].double()])
                weights = scores.softmax(0)[: len(seen)]
                output[token, head] = weights @ values[:, kv_head]
    return output


def make_step(chunks: list[tuple[int, int]], seed: int = 0, **padding: int) -> StepBatch:
    """A step of sequences that have `computed` tokens and compute `num_tokens` more, on blocks in random order."""
    rng = random.Random(seed)
    free = rng.sample(range(NUM_BLOCKS), NUM_BLOCKS)
    width = max(-(-sum(chunk) // BLOCK_SIZE) for chunk in chunks) + 2
    block_table = torch.full((len(chunks) + 1, width), NUM_BLOCKS, dtype=torch.int32)
    scheduled = []
    for row, (computed, num_tokens) in zip(rng.sample(range(len(chunks)), len(chunks)), chunks, strict=True):
        blocks = [free.pop() for _ in range(-(-(computed + num_tokens) // BLOCK_SIZE))]
        block_table[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        ids = [1] * (computed + num_tokens)
        scheduled.append((PackedSequence(row, ids, len(ids), blocks, num_computed_tokens=computed), num_tokens))
    return make_batch(scheduled, block_table, BLOCK_SIZE, **padding)


def make_tensors(batch: StepBatch, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query in the strides that models give it, and a cache full of random values, the trash block zero."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(NUM_HEADS, batch.num_tokens, HEAD_DIM_K, generator=generator).transpose(0, 1)
    key_cache = torch.randn(NUM_BLOCKS + 1, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM_K, generator=generator)
    value_cache = torch.randn(NUM_BLOCKS + 1, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM_V, generator=generator)
    key_cache[-1] = value_cache[-1] = 0
    return query, key_cache, value_cache


STEPS = {
    "first chunks": [(0, 1), (0, 9), (0, 4)],
    "decodes": [(7, 1), (0, 1), (30, 1), (3, 1)],
    "one decode": [(17, 1)],
    "later chunks": [(5, 6), (8, 8)],
    "decodes between chunks": [(12, 1), (3, 10), (21, 1), (0, 5), (6, 1)],
    "decodes of very different lengths": [(900, 1)] + [(i, 1) for i in range(12)],
}


@pytest.mark.parametrize("window", [None, 1, 6, 9, 40])
@pytest.mark.parametrize("extras", ["plain", "softcap", "sinks", "both"])
@pytest.mark.parametrize("step", STEPS)
def test_each_token_attends_to_its_own_sequence_up_to_itself(step: str, extras: str, window: int | None) -> None:
    batch = make_step(STEPS[step], num_padding_tokens=3, num_padding_seqs=2)
    query, key_cache, value_cache = make_tensors(batch)
    softcap = 2.0 if extras in ("softcap", "both") else None
    sinks = torch.linspace(-2, 3, NUM_HEADS) if extras in ("sinks", "both") else None
    attention = make_backend("torch", torch.device("cpu")).begin_step(batch)
    output = attention(
        query, key_cache, value_cache, scaling=SCALING, sliding_window=window, softcap=softcap, sinks=sinks
    )
    assert output.shape == (batch.num_tokens, NUM_HEADS, HEAD_DIM_V)
    assert output.isfinite().all()
    expected = attend_token_by_token(query, key_cache, value_cache, batch, window, softcap, sinks)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("window", "softcap", "has_sinks"), [(None, None, False), (6, 2.0, True), (9, None, True)])
def test_a_cache_of_8_bits_is_read_with_its_scales(
    window: int | None, softcap: float | None, has_sinks: bool, dtype: torch.dtype
) -> None:
    """K is 100 times as large in the cache as it is: a product of float16 would overflow there."""
    batch = make_step(STEPS["decodes between chunks"], num_padding_tokens=3, num_padding_seqs=2)
    query, key, value = (tensor.to(dtype) for tensor in make_tensors(batch))
    query = query * 40
    key_scale, value_scale = 0.01, 3.0
    key_cache, value_cache = quantize(key, key_scale), quantize(value, value_scale)
    sinks = torch.linspace(-2, 3, NUM_HEADS) if has_sinks else None
    attention = make_backend("torch", torch.device("cpu")).begin_step(batch)
    output = attention(
        query, key_cache, value_cache, scaling=SCALING * key_scale, sliding_window=window, softcap=softcap, sinks=sinks,
        value_scale=value_scale,
    )  # fmt: skip
    assert output.dtype == dtype
    meant = (cache.double() * scale for cache, scale in ((key_cache, key_scale), (value_cache, value_scale)))
    expected = attend_token_by_token(query, *meant, batch, window, softcap, sinks)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 4e-3)


def test_nan_in_a_cache_of_8_bits_reaches_the_tokens_that_see_it_and_no_others() -> None:
    for seed, plant_options in enumerate(PLANTS[:3]):
        step = make_paged_step([(1, 40), (21, 37), (5, 5)], num_seqs=4, num_tokens=30, seed=seed, scales=(0.02, 3.0))
        backend = make_backend("torch", torch.device("cpu"))
        found = check_planted(backend, step, {**plant_options, "seed": seed}, 1e-5, scaling=0.25)
        assert min(found) > 0, "a test needs tokens of both kinds"


def test_one_step_serves_layers_with_and_without_a_window() -> None:
    batch = make_step([(12, 1), (3, 10), (21, 1)])
    query, key_cache, value_cache = make_tensors(batch)
    attention = make_backend("torch", torch.device("cpu")).begin_step(batch)
    for window in (5, None, 5, 8):
        output = attention(
            query, key_cache, value_cache, scaling=SCALING, sliding_window=window, softcap=None, sinks=None
        )
        expected = attend_token_by_token(query, key_cache, value_cache, batch, window, None, None)
        torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)


def test_nothing_beyond_a_sequence_is_seen() -> None:
    """Cache content outside a sequence's own positions, huge values included, leaves its output untouched."""
    batch = make_step([(5, 1), (2, 4), (30, 1)])
    query, key_cache, value_cache = make_tensors(batch)
    mine = torch.zeros(NUM_BLOCKS + 1, BLOCK_SIZE, dtype=torch.bool)
    for i in range(batch.num_seqs):
        positions = torch.arange(int(batch.seq_lens[i]))
        blocks = batch.block_table[int(batch.seq_row[i])].long()[positions // BLOCK_SIZE]
        mine[blocks, positions % BLOCK_SIZE] = True
    outputs = []
    for filler in (0.0, 1e4):
        key_cache[~mine] = value_cache[~mine] = filler
        attention = make_backend("torch", torch.device("cpu")).begin_step(batch)
        outputs.append(
            attention(query, key_cache, value_cache, scaling=SCALING, sliding_window=None, softcap=None, sinks=None)
        )
    assert torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_what_is_not_finite_reaches_the_tokens_that_see_it_and_no_others(
    softcap: float | None, window: int | None, dtype: torch.dtype
) -> None:
    """NaN fills the cache outside of the sequences too."""
    lengths = [(1, 40), (21, 37), (1, 9), (1, 35), (5, 5), (18, 18), (1, 1)]
    num_found = [0, 0]
    for seed in range(3 * len(PLANTS)):
        plant_options = {**PLANTS[seed % len(PLANTS)], "seed": seed}
        step = make_paged_step(lengths, num_seqs=9, num_tokens=60, seed=seed, dtype=dtype)
        found = check_planted(
            make_backend("torch", torch.device("cpu")),
            step,
            plant_options,
            1e-5 if dtype == torch.float32 else 2e-2,
            scaling=0.25,
            sliding_window=window,
            softcap=softcap,
        )
        num_found = [count + more for count, more in zip(num_found, found, strict=True)]
    assert min(num_found) > 100, "this test needs tokens of both kinds"


def test_a_step_of_padding_alone_is_finite() -> None:
    batch = replace(
        make_step([(4, 1)], num_padding_tokens=3, num_padding_seqs=2),
        cu_seqlens=torch.zeros(4, dtype=torch.int32),
        seq_lens=torch.zeros(3, dtype=torch.int32),
    )
    query, key_cache, value_cache = make_tensors(batch)
    attention = make_backend("torch", torch.device("cpu")).begin_step(batch)
    output = attention(query, key_cache, value_cache, scaling=SCALING, sliding_window=None, softcap=None, sinks=None)
    assert torch.equal(output, torch.zeros(4, NUM_HEADS, HEAD_DIM_V))


def test_an_unknown_backend_is_named_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"model\.attention \('flesh'\) is unknown: use auto, torch"):
        make_backend("flesh", torch.device("cpu"))
