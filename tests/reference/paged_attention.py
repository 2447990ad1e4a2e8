"""Steps of made-up sequences over a paged cache, and their attention in plain torch, one sequence at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from workers.gpu.attention.backend import AttentionBackend
from workers.gpu.execution.step_batch import StepBatch

E4M3_NAN = 0x7F  # as a byte


@dataclass(frozen=True)
class PagedStep:
    """A step and one layer's tensors. The cache is NaN outside of the sequences, trash block included.

    A cache of float8_e4m3fn holds K and V divided by the scales; `keys` and `values` are what it stands for.
    """

    batch: StepBatch
    lengths: list[tuple[int, int]]  # of each real sequence: tokens in the step, KV length
    query: torch.Tensor  # [T, num_heads, head_dim_k]
    key_cache: torch.Tensor  # [num_blocks + 1, block_size, num_kv_heads, head_dim_k]
    value_cache: torch.Tensor  # the same with head_dim_v
    keys: list[torch.Tensor]  # of each real sequence, [KV length, num_kv_heads, head_dim_k]
    values: list[torch.Tensor]
    key_scale: float = 1.0
    value_scale: float = 1.0


def run_backend(
    backend: AttentionBackend,
    step: PagedStep,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return an attention backend's output for a step: [T, num_heads, head_dim_v]."""
    attention = backend.begin_step(step.batch)
    return attention(
        step.query,
        step.key_cache,
        step.value_cache,
        scaling=scaling * step.key_scale,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=sinks,
        value_scale=step.value_scale,
    )


def make_paged_step(
    lengths: Sequence[tuple[int, int]],
    *,
    num_seqs: int | None = None,
    num_tokens: int | None = None,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    head_dim_v: int | None = None,
    block_size: int = 4,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    scales: tuple[float, float] | None = None,
) -> PagedStep:
    """A step of sequences with (tokens in the step, KV length), padded to `num_seqs` and `num_tokens`.

    Rows and blocks are given in random order. `scales`: those of K and V in a cache of float8_e4m3fn; None = a cache of
    `dtype`.
    """
    random = torch.Generator(device=device).manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    num_real_seqs, num_real_tokens = len(lengths), sum(tokens for tokens, _ in lengths)
    num_seqs = num_real_seqs if num_seqs is None else num_seqs
    num_tokens = num_real_tokens if num_tokens is None else num_tokens
    blocks_of = [-(-length // block_size) for _, length in lengths]
    trash = sum(blocks_of) + 3
    free_blocks = torch.randperm(trash, generator=order)
    rows = torch.randperm(num_seqs, generator=order)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, device=device, dtype=torch.float32).to(dtype)

    key_scale, value_scale = (1.0, 1.0) if scales is None else scales
    stored = dtype if scales is None else torch.float8_e4m3fn
    key_cache = torch.full((trash + 1, block_size, num_kv_heads, head_dim), torch.nan, device=device).to(stored)
    value_cache = torch.full((trash + 1, block_size, num_kv_heads, head_dim_v), torch.nan, device=device).to(stored)
    block_table = torch.full((num_seqs + 1, max(blocks_of, default=1) + 2), trash, dtype=torch.int32)
    slot_mapping = torch.full((num_tokens,), trash * block_size, dtype=torch.int64)
    cu_seqlens = torch.full((num_seqs + 1,), num_real_tokens, dtype=torch.int32)
    seq_lens = torch.zeros(num_seqs, dtype=torch.int32)
    seq_row = torch.full((num_seqs,), num_seqs, dtype=torch.int32)
    keys, values = [], []
    first_block = first_token = 0
    for index, (tokens, length) in enumerate(lengths):
        blocks = free_blocks[first_block : first_block + blocks_of[index]]
        block_table[rows[index], : len(blocks)] = blocks.int()
        seq_row[index], seq_lens[index], cu_seqlens[index] = rows[index], length, first_token
        position = torch.arange(length)
        kv_slots = blocks[position // block_size] * block_size + position % block_size
        slot_mapping[first_token : first_token + tokens] = kv_slots[length - tokens :]
        for cache, scale, kept in ((key_cache, key_scale, keys), (value_cache, value_scale, values)):
            numbers = (normal(length, num_kv_heads, cache.shape[-1]).float() / scale).to(stored)
            kept.append(numbers.float() * scale)
            as_bytes(cache).flatten(0, 1)[kv_slots.to(device)] = as_bytes(numbers)
        first_block += len(blocks)
        first_token += tokens
    batch = StepBatch(
        input_ids=torch.zeros(num_tokens, dtype=torch.int64, device=device),
        positions=torch.zeros(num_tokens, dtype=torch.int64, device=device),
        slot_mapping=slot_mapping.to(device),
        cu_seqlens=cu_seqlens.to(device),
        seq_lens=seq_lens.to(device),
        seq_row=seq_row.to(device),
        logits_index=torch.zeros(num_seqs, dtype=torch.int64, device=device),
        block_table=block_table.to(device),
        block_size=block_size,
    )
    query = normal(num_tokens, num_heads, head_dim)
    return PagedStep(
        batch, list(lengths), query, key_cache, value_cache, keys, values, key_scale, value_scale
    )  # fmt: skip


def as_bytes(cache: torch.Tensor) -> torch.Tensor:
    """The bytes of float8_e4m3fn, for which torch can index; other tensors as they are."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


def plant(step: PagedStep, value: float, *, in_keys: bool, in_values: bool, seed: int = 0) -> torch.Tensor:
    """Put `value` into K or V of some of the positions that the step's own tokens hold, and of some older ones.

    In a cache of float8_e4m3fn, which has no infinity, NaN stands for it.

    `step.keys` and `step.values` stay as they were: `attend` still gives the right output for tokens that do not see
    it. Returns: the positions, [sequences, longest KV length] bool.
    """
    random = torch.Generator().manual_seed(seed)
    longest = max(length for _, length in step.lengths)
    planted = torch.zeros(len(step.lengths), longest, dtype=torch.bool)
    for index, (tokens, length) in enumerate(step.lengths):
        share = torch.where(torch.arange(length) < length - tokens, 0.02, 0.2)
        planted[index, :length] = torch.rand(length, generator=random) < share
        position = planted[index].nonzero()[:, 0]
        blocks = step.batch.block_table[int(step.batch.seq_row[index])].cpu().long()
        block_size = step.batch.block_size
        kv_slots = (blocks[position // block_size] * block_size + position % block_size).to(step.query.device)
        for cache, is_planted in ((step.key_cache, in_keys), (step.value_cache, in_values)):
            if is_planted:
                element = int(torch.randint(cache.shape[-1], (), generator=random))
                is_narrow = cache.dtype == torch.float8_e4m3fn
                as_bytes(cache).flatten(0, 1)[kv_slots, :, element] = E4M3_NAN if is_narrow else value
    return planted


def sees(step: PagedStep, positions: torch.Tensor, sliding_window: int | None) -> torch.Tensor:
    """Return the step's tokens that see one of the `positions` (see `plant`) of their sequence, [T] bool."""
    result = torch.zeros(step.batch.num_tokens, dtype=torch.bool)
    first_token = 0
    for own, (tokens, length) in zip(positions, step.lengths, strict=True):
        for i, query_position in enumerate(range(length - tokens, length)):
            first = 0 if sliding_window is None else max(0, query_position - sliding_window + 1)
            result[first_token + i] = own[first : query_position + 1].any()
        first_token += tokens
    return result


PLANTS = [
    {"value": value, "in_keys": in_keys, "in_values": in_values}
    for value in (torch.nan, torch.inf, -torch.inf)
    for in_keys, in_values in ((True, False), (False, True), (True, True))
]


def check_planted(
    backend: AttentionBackend, step: PagedStep, plant_options: dict[str, Any], tolerance: float, **options: Any
) -> tuple[int, int]:
    """Check that non-finite values reach the tokens that see them, and no others. Returns the numbers of both."""
    planted = plant(step, **plant_options)
    result = run_backend(backend, step, **options)
    expected = attend(step, **options)
    sees_it = sees(step, planted, options.get("sliding_window")).to(result.device)
    clean, bad = result[~sees_it], result[sees_it]
    assert clean.isfinite().all(), "a value that is not finite reached tokens that do not see it"
    torch.testing.assert_close(clean.float(), expected[~sees_it], atol=tolerance, rtol=tolerance)
    if plant_options["in_values"] or plant_options["value"] != plant_options["value"]:  # an infinite K may weigh 0
        assert not bad.isfinite().all(-1).any(), "a value that is not finite was lost"
    return len(clean), len(bad)


def attend(
    step: PagedStep,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the right output of attention, [T, num_heads, head_dim_v] float32; zeros for padding."""
    _, num_heads, _ = step.query.shape
    result = step.query.new_zeros(*step.query.shape[:2], step.value_cache.shape[-1], dtype=torch.float32)
    first_token = 0
    for (tokens, length), key, value in zip(step.lengths, step.keys, step.values, strict=True):
        query = step.query[first_token : first_token + tokens].float()
        group = num_heads // key.shape[1]
        key, value = (x.float().repeat_interleave(group, dim=1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        query_position = torch.arange(length - tokens, length, device=query.device)[:, None]
        key_position = torch.arange(length, device=query.device)[None, :]
        visible = key_position <= query_position
        if sliding_window is not None:
            visible &= key_position > query_position - sliding_window
        scores = scores.masked_fill(~visible, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.float()[:, None, None].expand(-1, tokens, 1)], dim=-1)
        weights = scores.softmax(dim=-1)[..., :length]
        result[first_token : first_token + tokens] = torch.einsum("hqk,khd->qhd", weights, value)
        first_token += tokens
    return result
