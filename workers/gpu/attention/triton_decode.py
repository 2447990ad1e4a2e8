"""Decode: one query token against all the KV it sees. The kernel reads each KV once, and this reading limits its speed.

The query heads that share a KV head are the rows of one product. A program computes one part of the line of work (see
triton_plan) for one KV head. It writes the result of each entry that lies within the part. If an entry lies only partly
within it, the program leaves a share: the running softmax, not normalized. A second kernel, `combine`, merges the
shares, as in Flash-Decoding (Dao et al., 2023). A program leaves at most two shares: one of the entry in which its part
begins, and one of the entry in which it ends.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from workers.gpu.attention.triton_plan import (
    COLUMNS,
    CUT_IS_WHOLE,
    CUT_PART,
    CUT_TOKEN,
    ENTRY_BEGIN,
    ENTRY_END,
    ENTRY_IS_WHOLE,
    ENTRY_LAST_PART,
    ENTRY_PART,
    ENTRY_ROW,
    ENTRY_TOKEN,
    ENTRY_UNIT,
    PART_ENTRY,
    PART_UNIT,
)
from workers.gpu.attention.triton_softmax import NO_SCORE, attend_range, normalize, scale_query


@triton.jit
def decode(
    result: tl.tensor,  # [T, num_heads, DIM_V]; this kernel zeroes padding tokens
    shares: tl.tensor,  # [parts, NUM_KV_HEADS, 2, GROUP, DIM_V] float32; 2 = the part's beginning, its end
    share_maximum: tl.tensor,  # [parts, NUM_KV_HEADS, 2, GROUP] float32
    share_total: tl.tensor,  # [parts, NUM_KV_HEADS, 2, GROUP] float32
    query: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    entries: tl.tensor,
    parts: tl.tensor,
    cu_seqlens: tl.tensor,
    block_table: tl.tensor,
    sinks: tl.tensor,
    num_seqs: tl.tensor,
    num_tokens: tl.tensor,
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
    BLOCK_GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM_K: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_DIM_K: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    PAIRED: tl.constexpr,
    DEPENDENT_LAUNCH: tl.constexpr,
) -> None:
    """Grid (parts * NUM_KV_HEADS). Attention of the decodes; see the module."""
    if DEPENDENT_LAUNCH:
        gdc_wait()  # for the KV of this step, and for the plan if it was made just before
        gdc_launch_dependents()
    program = tl.program_id(0)
    kv_head = program % NUM_KV_HEADS
    group = tl.arange(0, BLOCK_GROUP)
    dim_k = tl.arange(0, BLOCK_DIM_K)
    dim_v = tl.arange(0, BLOCK_DIM_V)

    token = tl.load(cu_seqlens + num_seqs) + program
    while token < num_tokens:
        padding = result + token.to(tl.int64) * (NUM_KV_HEADS * GROUP * DIM_V)
        for head in range(NUM_KV_HEADS):
            at = (head * GROUP + group)[:, None] * DIM_V + dim_v[None, :]
            tl.store(padding + at, 0.0, mask=(group < GROUP)[:, None] & (dim_v < DIM_V)[None, :])
        token += tl.num_programs(0)

    part = parts + (program // NUM_KV_HEADS) * COLUMNS
    part_begin = tl.load(part + PART_UNIT)
    part_end = tl.load(part + COLUMNS + PART_UNIT)
    entry = entries + tl.load(part + PART_ENTRY) * COLUMNS
    unit = part_begin
    while unit < part_end:
        query_token = tl.load(entry + ENTRY_TOKEN).to(tl.int64)
        begin = tl.load(entry + ENTRY_BEGIN)
        end = tl.load(entry + ENTRY_END)
        own_begin = unit - tl.load(entry + ENTRY_UNIT)
        num_units = (end - begin + UNIT - 1) // UNIT
        own_end = tl.minimum(own_begin + part_end - unit, num_units)

        head = kv_head * GROUP + group
        is_head = group < GROUP
        query_at = query + query_token * query_token_stride + head[:, None] * query_head_stride + dim_k[None, :]
        query_rows = tl.load(query_at, mask=is_head[:, None] & (dim_k < DIM_K)[None, :], other=0.0)
        query_rows, query_scale = scale_query(query_rows, key_cache)
        maximum, total, output = attend_range(
            tl.full([BLOCK_GROUP], NO_SCORE, tl.float32),
            tl.zeros([BLOCK_GROUP], tl.float32),
            tl.zeros([BLOCK_GROUP, BLOCK_DIM_V], tl.float32),
            query_rows,
            query_scale,
            tl.zeros([BLOCK_GROUP], tl.int32) + (end - 1),
            begin + own_begin * UNIT,
            tl.minimum(begin + own_end * UNIT, end),
            block_table + tl.load(entry + ENTRY_ROW).to(tl.int64) * table_stride,
            key_cache + kv_head * key_head_stride,
            value_cache + kv_head * value_head_stride,
            key_block_stride,
            key_token_stride,
            value_block_stride,
            value_token_stride,
            inner_scale,
            outer_scale,
            BLOCK_N=UNIT,
            BLOCK_SIZE=BLOCK_SIZE,
            DIM_K=DIM_K,
            DIM_V=DIM_V,
            BLOCK_DIM_K=BLOCK_DIM_K,
            BLOCK_DIM_V=BLOCK_DIM_V,
            CAUSAL=True,
            WINDOW=0,  # `begin` already accounts for the window
            SOFTCAP=SOFTCAP,
            PRECISION=PRECISION,
            PAIRED=PAIRED,
        )
        is_element = is_head[:, None] & (dim_v < DIM_V)[None, :]
        if own_end - own_begin == num_units:
            normalized = normalize(maximum, total, output, sinks, head, is_head, value_scale, SINKS)
            at = (query_token * (NUM_KV_HEADS * GROUP) + head)[:, None] * DIM_V + dim_v[None, :]
            tl.store(result + at, normalized.to(result.dtype.element_ty), mask=is_element)
        else:
            share = (program * 2 + (unit > part_begin).to(tl.int32)) * GROUP + group
            tl.store(shares + share[:, None] * DIM_V + dim_v[None, :], output, mask=is_element)
            tl.store(share_maximum + share, maximum, mask=is_head)
            tl.store(share_total + share, total, mask=is_head)
        unit += own_end - own_begin
        entry += COLUMNS


@triton.jit
def combine(
    result: tl.tensor,
    shares: tl.tensor,
    share_maximum: tl.tensor,
    share_total: tl.tensor,
    entries: tl.tensor,
    parts: tl.tensor,
    sinks: tl.tensor,
    value_scale: tl.tensor | None,
    BY_ENTRY: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_SHARES: tl.constexpr,  # shares that one iteration reads
    DIM_V: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
    SINKS: tl.constexpr,
    DEPENDENT_LAUNCH: tl.constexpr,
) -> None:
    """Combine the shares of each entry that begins in one part and ends in a later one.

    Grid (entries, query heads) with BY_ENTRY, which serves few entries; else (parts - 1, query heads): at most one
    entry leaves each part.
    """
    if DEPENDENT_LAUNCH:
        gdc_wait()  # for the shares
        gdc_launch_dependents()
    if BY_ENTRY:
        entry = entries + tl.program_id(0) * COLUMNS
        first_part = tl.load(entry + ENTRY_PART)
        last_part = tl.load(entry + ENTRY_LAST_PART)
        if first_part == last_part:
            return
        query_token = tl.load(entry + ENTRY_TOKEN).to(tl.int64)
        is_whole = tl.load(entry + ENTRY_IS_WHOLE)
    else:
        first_part = tl.program_id(0)
        part = parts + first_part * COLUMNS
        query_token = tl.load(part + CUT_TOKEN).to(tl.int64)
        last_part = tl.load(part + CUT_PART)
        is_whole = tl.load(part + CUT_IS_WHOLE)
        if query_token < 0:
            return

    head = tl.program_id(1) + tl.zeros([1], tl.int32)
    dim_v = tl.arange(0, BLOCK_DIM_V)
    maximum = tl.full([1], NO_SCORE, tl.float32)
    total = tl.zeros([1], tl.float32)
    output = tl.zeros([1, BLOCK_DIM_V], tl.float32)
    for some in range(first_part, last_part + 1, NUM_SHARES):
        owner = some + tl.arange(0, NUM_SHARES)
        is_share = owner <= last_part
        is_at_end = tl.where(owner == first_part, 1 - is_whole, 0)
        share = ((owner * NUM_KV_HEADS + head // GROUP) * 2 + is_at_end) * GROUP + head % GROUP
        own_maximum = tl.load(share_maximum + share, mask=is_share, other=NO_SCORE)
        own_total = tl.load(share_total + share, mask=is_share, other=0.0)
        mask = is_share[:, None] & (dim_v < DIM_V)[None, :]
        own_output = tl.load(shares + share[:, None] * DIM_V + dim_v[None, :], mask=mask, other=0.0)
        new_maximum = tl.maximum(maximum, tl.max(own_maximum, 0))
        decay = tl.exp2(maximum - new_maximum)
        weight = tl.exp2(own_maximum - new_maximum)
        total = total * decay + tl.sum(own_total * weight, 0)
        output = output * decay[:, None] + tl.sum(own_output * weight[:, None], 0)[None, :]
        maximum = new_maximum
    normalized = normalize(maximum, total, output, sinks, head, head >= 0, value_scale, SINKS)
    at = (query_token * (NUM_KV_HEADS * GROUP) + head)[:, None] * DIM_V + dim_v[None, :]
    tl.store(result + at, normalized.to(result.dtype.element_ty), mask=(dim_v < DIM_V)[None, :])
