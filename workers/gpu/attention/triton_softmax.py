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
    query: tl.tensor,  # [M, BLOCK_DIM_K]
    query_scale: tl.tensor,  # [M] float32, see `scale_query`; not used unless the cache is of 8 bits
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
    PAIRED: tl.constexpr = False,
) -> tl.tensor:
    """Add KV positions begin..end to the softmax. Returns (maximum, total, output).

    EXACT: a non-finite V makes the total NaN in rows that see it, and does not affect other rows.

    PAIRED: V is of 8 bits and read as pairs of dimensions, [BLOCK_N, BLOCK_DIM_V / 2] int16. A product takes pairs of
    positions from shared memory. GPUs transpose elements of 16 bits for that, but a thread would have to read elements
    of 8 bits one by one.
    """
    IS_NARROW: tl.constexpr = key_head.dtype.element_ty == tl.float8e4nv
    outer_scales = outer_scale
    if IS_NARROW:
        if SOFTCAP:
            inner_scale = (inner_scale * query_scale)[:, None]
        else:
            outer_scale = outer_scale * query_scale
            outer_scales = outer_scale[:, None]
    if PAIRED:
        NUM_PAIRS: tl.constexpr = BLOCK_DIM_V // 2
        pair = tl.arange(0, NUM_PAIRS)
        even_output, odd_output = tl.split(tl.reshape(output, [query.shape[0], NUM_PAIRS, 2]))
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
        value_at = value_head + (block * value_block_stride + token * value_token_stride)[:, None]
        if PAIRED:
            value_at = value_at.to(tl.pointer_type(tl.int16)) + pair[None, :]
        else:
            value_at = value_at + dim_v[None, :]
        key = _load(key_at, dim_k, DIM_K, BLOCK_DIM_K)
        scores = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision=PRECISION)
        if SOFTCAP:
            scores = 1.0 - 2.0 / (1.0 + tl.exp2(scores * (2.0 * inner_scale * LOG2_E)))  # tanh
        if CAUSAL:
            visible = position[None, :] <= query_position[:, None]
            if WINDOW > 0:
                visible = visible & (position[None, :] > query_position[:, None] - WINDOW)
            scores = tl.where(visible, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1) * outer_scale)
        weights = tl.exp2(scores * outer_scales - new_maximum[:, None])
        decay = tl.exp2(maximum - new_maximum)
        total = total * decay + tl.sum(weights, 1)
        if PAIRED:
            pairs = _load(value_at, pair, DIM_V // 2, BLOCK_DIM_V // 2)
            even = pairs.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(query.dtype)
            odd = (pairs >> 8).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(query.dtype)
            weights = weights.to(query.dtype)
            even_output = tl.dot(weights, even, even_output * decay[:, None], input_precision=PRECISION)
            odd_output = tl.dot(weights, odd, odd_output * decay[:, None], input_precision=PRECISION)
        else:
            value = _load(value_at, dim_v, DIM_V, BLOCK_DIM_V).to(query.dtype)
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
    if PAIRED:
        output = tl.reshape(tl.join(even_output, odd_output), [query.shape[0], BLOCK_DIM_V])
    return maximum, total, output


@triton.jit
def _load(at: tl.tensor, dim: tl.tensor, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr) -> tl.tensor:
    """Load rows of DIM elements, padded with zeros to BLOCK_DIM. `dim` counts the elements."""
    if DIM == BLOCK_DIM:
        loaded = tl.load(at)
    else:
        loaded = tl.load(at, mask=(dim < DIM)[None, :], other=0.0)
    return loaded


@triton.jit
def scale_query(query: tl.tensor, cache: tl.tensor) -> tl.tensor:
    """Return the query as it is multiplied with a key of `cache`, and a factor of its scores, [M] float32.

    GPUs convert 8 bits to float16 in one instruction, but to bfloat16 in many. So if the cache is of 8 bits, products
    are in float16: it holds each number of 8 bits, and each of bfloat16 if its range fits. Each row is divided by a
    power of two, so that its largest element lies in [1, 2). Queries of float32 stay as they are.
    """
    factor = tl.full([query.shape[0]], 1.0, tl.float32)
    if cache.dtype.element_ty == tl.float8e4nv and query.dtype != tl.float32:
        wide = query.to(tl.float32)
        largest = tl.max(tl.abs(wide), 1)
        exponent = tl.minimum(tl.maximum(largest.to(tl.int32, bitcast=True) & 0x7F800000, 1 << 23), 253 << 23)
        factor = exponent.to(tl.float32, bitcast=True)
        query = (wide / factor[:, None]).to(tl.float16)
    return query, factor


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
