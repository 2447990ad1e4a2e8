"""Prefill: sequences with several query tokens in the step, cut into tiles (see triton_plan).

A tile's rows are its tokens times the query heads that share a KV head. A short chunk after a long context therefore
reads that context once for all these heads.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from workers.gpu.attention.triton_plan import COLUMNS, TILE_POSITION, TILE_ROW, TILE_STOP, TILE_TOKEN
from workers.gpu.attention.triton_softmax import NO_SCORE, attend_range, normalize, scale_query


@triton.jit
def prefill(
    result: tl.tensor,  # [T, num_heads, DIM_V]
    query: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    tiles: tl.tensor,
    block_table: tl.tensor,
    sinks: tl.tensor,
    query_token_stride: tl.tensor,
    query_head_stride: tl.tensor,
    key_block_stride: tl.tensor,
    key_token_stride: tl.tensor,
    key_head_stride: tl.tensor,
    value_block_stride: tl.tensor,
    value_token_stride: tl.tensor,
    value_head_stride: tl.tensor,
    table_stride: tl.tensor,
    inner_scale: tl.tensor,
    outer_scale: tl.tensor,
    value_scale: tl.tensor | None,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM_K: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_DIM_K: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Grid (number of tiles * NUM_KV_HEADS). The last tiles come first, because they read the most KV."""
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    tile = tiles + ((tl.num_programs(0) - 1 - tl.program_id(0)) // NUM_KV_HEADS) * COLUMNS
    first_token = tl.load(tile + TILE_TOKEN)
    stop = tl.load(tile + TILE_STOP)
    if first_token >= stop:
        return
    first_position = tl.load(tile + TILE_POSITION)
    end = first_position + tl.minimum(BLOCK_Q, stop - first_token)

    row = tl.arange(0, BLOCK_M)
    token = first_token.to(tl.int64) + row // GROUP
    head = kv_head * GROUP + row % GROUP
    is_row = (row < BLOCK_Q * GROUP) & (token < stop)
    position = first_position + row // GROUP
    dim_k = tl.arange(0, BLOCK_DIM_K)
    query_at = query + (token * query_token_stride + head * query_head_stride)[:, None] + dim_k[None, :]
    query_rows = tl.load(query_at, mask=is_row[:, None] & (dim_k < DIM_K)[None, :], other=0.0)
    query_rows, query_scale = scale_query(query_rows, key_cache)
    blocks = block_table + tl.load(tile + TILE_ROW).to(tl.int64) * table_stride

    maximum = tl.full([BLOCK_M], NO_SCORE, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    output = tl.zeros([BLOCK_M, BLOCK_DIM_V], tl.float32)
    edge = 0  # from this position on, different rows see different KV
    if WINDOW > 0:
        edge = tl.maximum(first_position - WINDOW + 1, 0)
    else:
        edge = (first_position + 1) // BLOCK_N * BLOCK_N
        maximum, total, output = attend_range(
            maximum,
            total,
            output,
            query_rows,
            query_scale,
            position,
            0,
            edge,
            blocks,
            key_cache + kv_head * key_head_stride,
            value_cache + kv_head * value_head_stride,
            key_block_stride,
            key_token_stride,
            value_block_stride,
            value_token_stride,
            inner_scale,
            outer_scale,
            BLOCK_N=BLOCK_N,
            BLOCK_SIZE=BLOCK_SIZE,
            DIM_K=DIM_K,
            DIM_V=DIM_V,
            BLOCK_DIM_K=BLOCK_DIM_K,
            BLOCK_DIM_V=BLOCK_DIM_V,
            CAUSAL=False,
            WINDOW=0,
            SOFTCAP=SOFTCAP,
            PRECISION=PRECISION,
        )
    maximum, total, output = attend_range(
        maximum,
        total,
        output,
        query_rows,
        query_scale,
        position,
        edge,
        end,
        blocks,
        key_cache + kv_head * key_head_stride,
        value_cache + kv_head * value_head_stride,
        key_block_stride,
        key_token_stride,
        value_block_stride,
        value_token_stride,
        inner_scale,
        outer_scale,
        BLOCK_N=BLOCK_N,
        BLOCK_SIZE=BLOCK_SIZE,
        DIM_K=DIM_K,
        DIM_V=DIM_V,
        BLOCK_DIM_K=BLOCK_DIM_K,
        BLOCK_DIM_V=BLOCK_DIM_V,
        CAUSAL=True,
        WINDOW=WINDOW,
        SOFTCAP=SOFTCAP,
        PRECISION=PRECISION,
    )
    bad = tl.sum(tl.sum((output - output != 0).to(tl.int32), 1), 0)
    if bad > 0:  # NaN or infinity, perhaps from a position that only other rows of the tile see
        start = 0
        if WINDOW > 0:
            start = edge
        maximum, total, output = attend_range(
            tl.full([BLOCK_M], NO_SCORE, tl.float32),
            tl.zeros([BLOCK_M], tl.float32),
            tl.zeros([BLOCK_M, BLOCK_DIM_V], tl.float32),
            query_rows,
            query_scale,
            position,
            start,
            end,
            blocks,
            key_cache + kv_head * key_head_stride,
            value_cache + kv_head * value_head_stride,
            key_block_stride,
            key_token_stride,
            value_block_stride,
            value_token_stride,
            inner_scale,
            outer_scale,
            BLOCK_N=16,
            BLOCK_SIZE=BLOCK_SIZE,
            DIM_K=DIM_K,
            DIM_V=DIM_V,
            BLOCK_DIM_K=BLOCK_DIM_K,
            BLOCK_DIM_V=BLOCK_DIM_V,
            CAUSAL=True,
            WINDOW=WINDOW,
            SOFTCAP=SOFTCAP,
            PRECISION=PRECISION,
            EXACT=True,
        )
    normalized = normalize(maximum, total, output, sinks, head, is_row, value_scale, SINKS)
    dim_v = tl.arange(0, BLOCK_DIM_V)
    at = (token * (NUM_KV_HEADS * GROUP) + head)[:, None] * DIM_V + dim_v[None, :]
    tl.store(result + at, normalized.to(result.dtype.element_ty), mask=is_row[:, None] & (dim_v < DIM_V)[None, :])
