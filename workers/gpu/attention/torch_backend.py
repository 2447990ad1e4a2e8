"""Attention over the paged cache in plain torch: the CPU's backend, and the oracle in the tests of the other backends.

The backend sorts a step's sequences into groups and computes each group at once. Decodes (one token) of similar length
share a group; each prefill chunk is one group. A group gathers its blocks of the cache into one padded tensor. Block
numbers and masks are equal in all layers with the same window, so they are computed once per step and window.

A cache of 8 bits is read as float32, and its attention is computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import torch
from torch.nn.functional import scaled_dot_product_attention

from workers.gpu.e4m3 import E4M3
from workers.gpu.execution.step_batch import StepBatch
from workers.gpu.model.probed_model import ProbedModel

_MAX_GATHERED: Final = 2048  # most KV positions that a group of decodes gathers: they fit a core's cache


class TorchBackend:
    """See `AttentionBackend`."""

    needs_host_lengths = True

    def __init__(self) -> None:
        self._keys = _Gatherer()
        self._values = _Gatherer()

    def check(self, facts: ProbedModel) -> None:
        """Accept every model: this backend supports all features."""

    def begin_step(self, batch: StepBatch) -> _TorchStep:
        return _TorchStep(batch, self._keys, self._values)


class _Gatherer:
    """Gathers blocks into memory that it keeps. Page faults of fresh memory of this size would cost more than the copy.

    Each call overwrites the result of the call before.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0)
        self._widened = torch.empty(0)  # the same in float32, of a cache of 8 bits

    def __call__(self, cache: torch.Tensor, group: _Group) -> torch.Tensor:
        """Return the group's K or V, a view of shape [G, num_kv_heads, L, head_dim]."""
        is_narrow = cache.dtype == E4M3
        if is_narrow:  # as bytes, because torch's operations on float8 depend on the device
            cache = cache.view(torch.uint8)
        sizes = (group.blocks.shape[0], *cache.shape[1:])
        if self._memory.numel() < math.prod(sizes) or self._memory.dtype != cache.dtype:
            self._memory = cache.new_empty(math.prod(sizes))
        blocks = self._memory[: math.prod(sizes)].view(sizes)
        torch.index_select(cache, 0, group.blocks, out=blocks)
        if is_narrow:
            if self._widened.numel() < blocks.numel():
                self._widened = torch.empty(blocks.numel(), device=cache.device)
            blocks = self._widened[: blocks.numel()].view(sizes).copy_(blocks.view(E4M3))
        return blocks.view(group.num_seqs, -1, *cache.shape[2:])[:, : group.num_keys].transpose(1, 2)


@dataclass(frozen=True)
class _Sequence:
    """One sequence of a step, in host integers. Its tokens are start..start + num_tokens of the packed batch."""

    index: int  # in the batch
    start: int
    num_tokens: int
    seq_len: int  # length of its KV, this step's tokens included


@dataclass(frozen=True)
class _Group:
    """G sequences with n tokens each. Their KV is gathered into L positions."""

    tokens: torch.Tensor | slice  # indices in the packed batch, G * n of them
    num_seqs: int
    num_tokens: int  # n
    num_keys: int  # L
    blocks: torch.Tensor  # [G * ceil(L / block_size)] int64
    mask: torch.Tensor | None  # [G, 1, n, L] bool, True = attend; None = plain causal with n == L


class _TorchStep:
    """See `StepAttention`."""

    def __init__(self, batch: StepBatch, gather_keys: _Gatherer, gather_values: _Gatherer) -> None:
        self._batch = batch
        self._gather_keys = gather_keys
        self._gather_values = gather_values
        starts = batch.cu_seqlens.tolist()
        self._sequences = [
            _Sequence(index, start, end - start, seq_len)
            for index, (start, end, seq_len) in enumerate(
                zip(starts[:-1], starts[1:], batch.seq_lens.tolist(), strict=True)
            )
            if end > start
        ]
        self._groups: dict[int | None, list[_Group]] = {}  # by sliding window

    def __call__(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
        value_scale: float = 1.0,
    ) -> torch.Tensor:
        if key_cache.dtype == E4M3 and query.dtype != torch.float32:
            wide = self(
                query.float(), key_cache, value_cache, scaling=scaling, sliding_window=sliding_window, softcap=softcap,
                sinks=sinks, value_scale=value_scale,
            )  # fmt: skip
            return wide.to(query.dtype)
        groups = self._groups.get(sliding_window)
        if groups is None:
            groups = self._groups[sliding_window] = list(self._make_groups(sliding_window))
        num_tokens, num_heads, _ = query.shape
        outputs: list[torch.Tensor] = []
        for group in groups:
            keys = self._gather_keys(key_cache, group)
            values = self._gather_values(value_cache, group)
            queries = query[group.tokens].view(group.num_seqs, group.num_tokens, num_heads, -1)
            output: torch.Tensor | None = None
            if softcap is None and sinks is None:
                output = _attend_fused(queries, keys, values, group.mask, scaling)
            if output is None or not _is_finite(output):
                output = _attend_in_steps(queries, keys, values, group.mask, scaling, softcap, sinks)
            outputs.append(output if value_scale == 1.0 else output * value_scale)
        if len(groups) == 1 and outputs[0].shape[0] == num_tokens:
            return outputs[0]
        result = query.new_zeros(num_tokens, num_heads, value_cache.shape[-1])
        for group, output in zip(groups, outputs, strict=True):
            result[group.tokens] = output
        return result

    def _make_groups(self, window: int | None) -> Iterator[_Group]:
        decodes = [sequence for sequence in self._sequences if sequence.num_tokens == 1]
        for members in _by_length(decodes, window):
            yield self._make_group(members, window)
        for sequence in self._sequences:
            if sequence.num_tokens > 1:
                yield self._make_group([sequence], window)

    def _make_group(self, members: list[_Sequence], window: int | None) -> _Group:
        block_table, block_size, device = (
            self._batch.block_table,
            self._batch.block_size,
            self._batch.block_table.device,
        )
        num_tokens = members[0].num_tokens
        first_blocks = [_first_position(sequence, window) // block_size for sequence in members]
        num_keys = max(
            sequence.seq_len - first * block_size for sequence, first in zip(members, first_blocks, strict=True)
        )
        num_blocks = -(-num_keys // block_size)
        if len(members) == 1:
            tokens: torch.Tensor | slice = slice(members[0].start, members[0].start + num_tokens)
        elif all(second.start == first.start + 1 for first, second in pairwise(members)):
            tokens = slice(members[0].start, members[-1].start + 1)
        else:
            tokens = torch.tensor([sequence.start for sequence in members], device=device)

        first_block = torch.tensor(first_blocks, device=device).unsqueeze(1)  # [G, 1]
        row = self._batch.seq_row[torch.tensor([sequence.index for sequence in members], device=device)]
        column = first_block + torch.arange(num_blocks, device=device)  # [G, blocks each]
        column = column.clamp(max=block_table.shape[1] - 1)  # beyond the table, so masked
        blocks = block_table[row.unsqueeze(1), column].flatten()

        mask: torch.Tensor | None = None
        is_causal = len(members) == 1 and num_keys == num_tokens and first_blocks == [0]
        if not is_causal or (window is not None and window < num_tokens):
            seq_len = torch.tensor([sequence.seq_len for sequence in members], device=device)
            query_position = (seq_len.unsqueeze(1) - num_tokens + torch.arange(num_tokens, device=device)).unsqueeze(2)
            key_position = (first_block * block_size + torch.arange(num_keys, device=device)).unsqueeze(1)
            mask = key_position <= query_position
            if window is not None:
                mask &= key_position > query_position - window
            mask = mask.unsqueeze(1)
        return _Group(tokens, len(members), num_tokens, num_keys, blocks.long(), mask)


def _first_position(sequence: _Sequence, window: int | None) -> int:
    """Return the first KV position that any of the sequence's tokens in this step sees."""
    return 0 if window is None else max(0, sequence.seq_len - sequence.num_tokens + 1 - window)


def _by_length(decodes: list[_Sequence], window: int | None) -> Iterator[list[_Sequence]]:
    """Group decodes of similar length, to pad little. A group gathers at most _MAX_GATHERED positions (or one
    sequence)."""

    def length(sequence: _Sequence) -> int:
        return sequence.seq_len - _first_position(sequence, window)

    group: list[_Sequence] = []
    for sequence in sorted(decodes, key=length):
        if group and (len(group) + 1) * length(sequence) > _MAX_GATHERED:
            yield sorted(group, key=lambda member: member.start)
            group = []
        group.append(sequence)
    if group:
        yield sorted(group, key=lambda member: member.start)


def _attend_fused(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """[G, n, num_heads, head_dim] queries -> [G * n, num_heads, head_dim_v], by torch's fused kernels.

    These kernels give a masked position the weight 0, so NaN or infinity in its K or V still makes the output NaN.
    """
    num_seqs, num_tokens, num_heads, _ = queries.shape
    num_kv_heads = keys.shape[1]
    if num_tokens == 1:  # query heads that share a KV head become its query positions: K and V are not repeated
        queries = queries.view(num_seqs, num_kv_heads, num_heads // num_kv_heads, -1)
        output = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scaling)
        return output.reshape(num_seqs, num_heads, -1)
    output = scaled_dot_product_attention(
        queries.transpose(1, 2),
        keys,
        values,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=num_heads != num_kv_heads,
    )
    return output.transpose(1, 2).flatten(0, 1)


def _attend_in_steps(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Compute the same in plain torch operations, with soft cap and sinks. The softmax is in float32.

    Masked positions contribute exactly nothing, even if their K or V is NaN. A query that sees a non-finite V gets NaN.
    """
    num_seqs, num_tokens, num_heads, _ = queries.shape
    num_kv_heads, num_keys = keys.shape[1:3]
    queries = queries.view(num_seqs, num_tokens, num_kv_heads, num_heads // num_kv_heads, -1).permute(
        0, 2, 3, 1, 4
    )  # [G, num_kv_heads, heads each, n, dim]
    scores = torch.matmul(queries, keys.unsqueeze(2).transpose(3, 4)).float() * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        mask = torch.ones(num_tokens, num_keys, dtype=torch.bool, device=scores.device).tril()
    else:
        mask = mask.unsqueeze(1)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sink = sinks.float().view(1, num_kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    weights = weights.to(values.dtype)
    output = torch.matmul(weights, values.unsqueeze(2))  # [G, num_kv_heads, heads each, n, head_dim_v]
    if not _is_finite(output):
        is_finite = values.isfinite().all(-1)  # [G, num_kv_heads, L]
        output = torch.matmul(weights, values.masked_fill(~is_finite.unsqueeze(-1), 0.0).unsqueeze(2))
        sees_bad = (mask & ~is_finite[:, :, None, None, :]).any(-1, keepdim=True)
        output = output.masked_fill(sees_bad, torch.nan)
    return output.permute(0, 3, 1, 2, 4).reshape(num_seqs * num_tokens, num_heads, -1)


def _is_finite(output: torch.Tensor) -> bool:
    """Return whether every element is finite, in one pass. A sum that overflows also gives False; the slower path is
    then used, which is also right."""
    return math.isfinite(output.sum(dtype=torch.float32).item())
