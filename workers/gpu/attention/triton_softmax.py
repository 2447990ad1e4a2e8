"""The running softmax that both attention kernels use, over a range of one sequence's KV read through its block table.

This is the online softmax (Milakov and Gimelshein, 2018) as in FlashAttention (Dao et al., 2022). Its state per query
row has three parts: the largest score so far (as a power of two, for exp2), the sum of weights relative to it, and the
weighted sum of values. The largest score starts as a finite number, so that no difference is NaN before a row has seen
a position.

A position that a row does not see has the weight 0. If its V is NaN or infinite, that is not enough: 0 x NaN is NaN.
Such a V is rare. The prefill kernel looks for NaN in its output, and computes a tile again with EXACT if it finds any.
The decode kernel reads only positions that its query sees.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
NO_SCORE = tl.constexpr(-1.0e30)  # below every score, but finite: -inf minus -inf would be NaN


@triton.jit
def attend_range(
    maximum: tl.tensor,  # [M] float32
    total: tl.tensor,  # [M] float32
    output: tl.tensor,  # [M, BLOCK_DIM_V] float32
    query: tl.tensor,  # [M, BLOCK_DIM_K]; K and V are converted to its dtype, which changes them only if of 8 bits
    query_position: tl.tensor,  # [M] int32: a row sees KV up to and including its position
    begin: tl.tensor,
    end: tl.tensor,  # end of the range of KV positions; without CAUSAL the range is a multiple of BLOCK_N
    blocks: tl.tensor,  # the sequence's row of the block table
    key_head: tl.tensor,  # this KV head in kv_slot 0 of each cache
    value_head: tl.tensor,
    key_block_stride: tl.tensor,
    key_token_stride: tl.tensor,
    value_block_stride: tl.tensor,
    value_token_stride: tl.tensor,
    inner_scale: tl.tensor,  # factor of the scores before the soft cap
    outer_scale: tl.tensor,  # factor of the scores after it, log2(e) included
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM_K: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_DIM_K: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr = False,
) -> tl.tensor:
    """Add KV positions begin..end to the softmax. Returns (maximum, total, output).

    EXACT: a non-finite V makes the total NaN in rows that see it, and does not affect other rows.
    """
    dim_k = tl.arange(0, BLOCK_DIM_K)
    dim_v = tl.arange(0, BLOCK_DIM_V)
    last = tl.maximum(end - 1, 0)  # positions beyond `end` may belong to another sequence, or be NaN
    next_block = tl.load(blocks + tl.minimum(begin + tl.arange(0, BLOCK_N), last) // BLOCK_SIZE)
    for tile_begin in range(begin, end, BLOCK_N):
        position = tile_begin + tl.arange(0, BLOCK_N)
        stored = position
        if CAUSAL:
            stored = tl.minimum(position, last)
        # Block numbers are loaded one tile ahead, so that the copies of K and V do not wait for them.
        block = next_block.to(tl.int64)
        next_block = tl.load(blocks + tl.minimum(position + BLOCK_N, last) // BLOCK_SIZE)
        token = stored % BLOCK_SIZE
        key_at = key_head + (block * key_block_stride + token * key_token_stride)[:, None] + dim_k[None, :]
        value_at = value_head + (block * value_block_stride + token * value_token_stride)[:, None] + dim_v[None, :]
        if DIM_K == BLOCK_DIM_K:
            key = tl.load(key_at)
        else:
            key = tl.load(key_at, mask=(dim_k < DIM_K)[None, :], other=0.0)
        scores = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision=PRECISION)
        if SOFTCAP:
            scores = 1.0 - 2.0 / (1.0 + tl.exp2(scores * (2.0 * inner_scale * LOG2_E)))  # tanh
        if CAUSAL:
            visible = position[None, :] <= query_position[:, None]
            if WINDOW > 0:
                visible = visible & (position[None, :] > query_position[:, None] - WINDOW)
            scores = tl.where(visible, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1) * outer_scale)
        weights = tl.exp2(scores * outer_scale - new_maximum[:, None])
        decay = tl.exp2(maximum - new_maximum)
        total = total * decay + tl.sum(weights, 1)
        if DIM_V == BLOCK_DIM_V:
            value = tl.load(value_at)
        else:
            value = tl.load(value_at, mask=(dim_v < DIM_V)[None, :], other=0.0)
        value = value.to(query.dtype)
        if EXACT:
            is_bad = value - value != 0
            value = tl.where(is_bad, tl.zeros_like(value), value)
            is_bad_position = tl.max(is_bad.to(tl.int32), 1) > 0
            sees_bad = is_bad_position[None, :] & (position[None, :] <= query_position[:, None])
            if WINDOW > 0:
                sees_bad = sees_bad & (position[None, :] > query_position[:, None] - WINDOW)
            total += tl.where(tl.max(sees_bad.to(tl.int32), 1) > 0, float("nan"), 0.0)
        output = tl.dot(weights.to(value.dtype), value, output * decay[:, None], input_precision=PRECISION)
        maximum = new_maximum
    return maximum, total, output


@triton.jit
def normalize(
    maximum: tl.tensor,
    total: tl.tensor,
    output: tl.tensor,
    sinks: tl.tensor,
    head: tl.tensor,
    mask: tl.tensor,
    value_scale: tl.tensor | None,
    SINKS: tl.constexpr,
) -> tl.tensor:
    """Return the softmax's result, [M, BLOCK_DIM_V]. `sinks`, indexed by `head` [M], add weight but no value.
    `value_scale` is a factor of V; None = 1.

    A total of NaN makes the row NaN. So does a total of 0, which means that every score of the row was -inf.
    """
    if SINKS:
        sink = tl.load(sinks + head, mask=mask, other=0.0).to(tl.float32) * LOG2_E
        new_maximum = tl.maximum(maximum, sink)
        decay = tl.exp2(maximum - new_maximum)
        total = total * decay + tl.exp2(sink - new_maximum)
        output = output * decay[:, None]
    output = output / total[:, None]
    if value_scale is not None:
        output = output * value_scale
    return output
