"""Decode: one query token against all the KV it sees. Bound by the reading of that KV, once.

The query heads that share a KV head are the rows of one product. A fixed number of programs share the work in equal
parts (see triton_plan). What a program computes of an entry and head is its share: the whole of it is written to
the output at once; otherwise it is left, not normalized, for a second kernel to combine. A program leaves at most two
shares, of where its part begins and of where it ends.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from workers.gpu.attention.triton_plan import (
    COLUMNS,
    ENTRY_BEGIN,
    ENTRY_END,
    ENTRY_ROW,
    ENTRY_TOKEN,
    ENTRY_UNIT,
    part_of,
    program_of,
)
from workers.gpu.attention.triton_softmax import NO_SCORE, attend_range, normalize


@triton.jit
def decode(
    result: tl.tensor,  # [T, num_heads, DIM_V]; tokens that are padding are zeroed here
    shares: tl.tensor,  # [NUM_PROGRAMS, 2, GROUP, DIM_V] float32: at the begin of a program's part, at its end
    share_maximum: tl.tensor,  # [NUM_PROGRAMS, 2, GROUP] float32
    share_total: tl.tensor,  # the same
    query: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    entries: tl.tensor,
    programs: tl.tensor,
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
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM_K: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_DIM_K: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    PREFETCH: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    group = tl.arange(0, BLOCK_GROUP)
    dim_k = tl.arange(0, BLOCK_DIM_K)
    dim_v = tl.arange(0, BLOCK_DIM_V)

    token = tl.load(cu_seqlens + num_seqs) + program
    while token < num_tokens:
        padding = result + token.to(tl.int64) * (NUM_KV_HEADS * GROUP * DIM_V)
        for head in range(NUM_KV_HEADS):
            at = (head * GROUP + group)[:, None] * DIM_V + dim_v[None, :]
            tl.store(padding + at, 0.0, mask=(group < GROUP)[:, None] & (dim_v < DIM_V)[None, :])
        token += NUM_PROGRAMS

    units = tl.load(programs + NUM_PROGRAMS).to(tl.int64) * NUM_KV_HEADS
    num_parts = tl.minimum(units, NUM_PROGRAMS)
    if program >= num_parts:
        return
    part_begin = part_of(program, units, num_parts)
    part_end = part_of(program + 1, units, num_parts)
    number = tl.load(programs + program)
    unit = part_begin
    while unit < part_end:
        entry = entries + number * COLUMNS
        query_token = tl.load(entry + ENTRY_TOKEN).to(tl.int64)
        begin = tl.load(entry + ENTRY_BEGIN)
        end = tl.load(entry + ENTRY_END)
        entry_unit = tl.load(entry + ENTRY_UNIT) * NUM_KV_HEADS
        num_units = (end - begin + UNIT - 1) // UNIT
        kv_head = (unit - entry_unit) // num_units
        own_begin = (unit - entry_unit) % num_units
        own_end = tl.minimum(own_begin + part_end - unit, num_units)

        head = kv_head * GROUP + group
        is_head = group < GROUP
        query_at = query + query_token * query_token_stride + head[:, None] * query_head_stride + dim_k[None, :]
        query_rows = tl.load(query_at, mask=is_head[:, None] & (dim_k < DIM_K)[None, :], other=0.0)
        maximum, total, output = attend_range(
            tl.full([BLOCK_GROUP], NO_SCORE, tl.float32),
            tl.zeros([BLOCK_GROUP], tl.float32),
            tl.zeros([BLOCK_GROUP, BLOCK_DIM_V], tl.float32),
            query_rows,
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
            WINDOW=0,  # `begin` is the window's
            SOFTCAP=SOFTCAP,
            PRECISION=PRECISION,
            PREFETCH=PREFETCH,
        )
        is_element = is_head[:, None] & (dim_v < DIM_V)[None, :]
        if own_end - own_begin == num_units:
            normalized = normalize(maximum, total, output, sinks, head, is_head, SINKS)
            at = (query_token * (NUM_KV_HEADS * GROUP) + head)[:, None] * DIM_V + dim_v[None, :]
            tl.store(result + at, normalized.to(result.dtype.element_ty), mask=is_element)
        else:
            share = (program * 2 + (unit > part_begin).to(tl.int32)) * GROUP + group
            tl.store(shares + share[:, None] * DIM_V + dim_v[None, :], output, mask=is_element)
            tl.store(share_maximum + share, maximum, mask=is_head)
            tl.store(share_total + share, total, mask=is_head)
        unit += own_end - own_begin
        if unit == entry_unit + num_units * NUM_KV_HEADS:
            number += 1


@triton.jit
def combine(
    result: tl.tensor,
    shares: tl.tensor,
    share_maximum: tl.tensor,
    share_total: tl.tensor,
    entries: tl.tensor,
    programs: tl.tensor,
    sinks: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
    NUM_SHARES: tl.constexpr,  # that are read at once
    DIM_V: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
    SINKS: tl.constexpr,
) -> None:
    """Grid (NUM_PROGRAMS - 1, GROUP): combine what the end of one program's part began and the next continued."""
    program = tl.program_id(0)
    units = tl.load(programs + NUM_PROGRAMS).to(tl.int64) * NUM_KV_HEADS
    num_parts = tl.minimum(units, NUM_PROGRAMS)
    if program + 1 >= num_parts:
        return
    entry = entries + tl.load(programs + program + 1) * COLUMNS
    num_units = (tl.load(entry + ENTRY_END) - tl.load(entry + ENTRY_BEGIN) + UNIT - 1) // UNIT
    entry_unit = tl.load(entry + ENTRY_UNIT) * NUM_KV_HEADS
    next_begin = part_of(program + 1, units, num_parts)
    kv_head = (next_begin - entry_unit) // num_units
    begin = entry_unit + kv_head * num_units  # of this entry and head, on the line
    if begin == next_begin:
        return  # nothing was cut here
    if program_of(begin, units, num_parts) != program:
        return  # it was begun by a program before, which combines it
    last_program = program_of(begin + num_units - 1, units, num_parts)

    number = tl.arange(0, NUM_SHARES)
    dim_v = tl.arange(0, BLOCK_DIM_V)
    maximum = tl.full([1], NO_SCORE, tl.float32)
    total = tl.zeros([1], tl.float32)
    output = tl.zeros([1, BLOCK_DIM_V], tl.float32)
    is_at_end = (part_of(program, units, num_parts) < begin).to(tl.int32)  # the first share; all others are at a begin
    for first in range(program, last_program + 1, NUM_SHARES):
        owner = first + number
        is_share = owner <= last_program
        share = (owner * 2 + tl.where(owner == program, is_at_end, 0)) * GROUP + tl.program_id(1)
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
    head = kv_head * GROUP + tl.program_id(1) + tl.zeros([1], tl.int32)
    normalized = normalize(maximum, total, output, sinks, head, head >= 0, SINKS)
    token = tl.load(entry + ENTRY_TOKEN).to(tl.int64)
    at = (token * (NUM_KV_HEADS * GROUP) + head)[:, None] * DIM_V + dim_v[None, :]
    tl.store(result + at, normalized.to(result.dtype.element_ty), mask=(dim_v < DIM_V)[None, :])
