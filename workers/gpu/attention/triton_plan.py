"""Who computes what in a step, worked out on the device: lengths are read there, so that a captured graph fits any.

Decodes. An entry is one query token and the KV it sees, cut into units of UNIT positions. All units of all entries and
KV heads form one line (an entry's heads follow one another), and a fixed number of programs share it in equal
contiguous parts, whatever the lengths are: few long sequences are split among many programs, many short ones are not
split at all. (Osama et al. 2023 cut matrix products so, "Stream-K".)

Prefills. A tile is up to BLOCK_Q consecutive tokens of one sequence.

In a bucket with as many tokens as sequences every token is an entry. In others an entry is a sequence that has one
token in the step; tiles are cut from the rest.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from workers.gpu.batch import StepBatch

# Columns of the tables. Rows of 8 integers, so that a row is one sector of memory.
ENTRY_TOKEN = tl.constexpr(0)  # in the packed batch
ENTRY_ROW = tl.constexpr(1)  # of the block table
ENTRY_BEGIN = tl.constexpr(2)  # first KV position it sees
ENTRY_END = tl.constexpr(3)  # behind the last, which is its own
ENTRY_UNIT = tl.constexpr(4)  # units of the entries before, per KV head
TILE_TOKEN = tl.constexpr(0)  # its first, in the packed batch
TILE_STOP = tl.constexpr(1)  # behind the sequence's last token; 0 = there is no such tile
TILE_ROW = tl.constexpr(2)
TILE_POSITION = tl.constexpr(3)  # of its first token
COLUMNS = tl.constexpr(8)

_PER_PROGRAM: Final = 16  # parts of the line, or tiles, that one program of the planning kernels looks up


def plan_decodes(
    batch: StepBatch, *, num_kv_heads: int, window: int, unit: int, num_programs: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Share the decodes of a step among `num_programs` programs. `window` 0 = none.

    Returns: entries [S, 8] int32, those that exist first; and programs [num_programs + 1] int32, the entry in which
    each program's part begins, and then the number of units per KV head.
    """
    num_seqs = batch.num_seqs
    entries = torch.empty(num_seqs, COLUMNS.value, dtype=torch.int32, device=batch.seq_lens.device)
    programs = torch.empty(num_programs + 1, dtype=torch.int32, device=batch.seq_lens.device)
    _plan_decodes[(triton.cdiv(num_programs, _PER_PROGRAM),)](
        entries,
        programs,
        batch.cu_seqlens,
        batch.seq_lens,
        batch.seq_row,
        num_seqs,
        EVERY_TOKEN=batch.num_tokens == num_seqs,
        NUM_KV_HEADS=num_kv_heads,
        WINDOW=window,
        UNIT=unit,
        NUM_PROGRAMS=num_programs,
        PER_PROGRAM=_PER_PROGRAM,
        BLOCK_S=triton.next_power_of_2(num_seqs),
    )
    return entries, programs


def plan_tiles(batch: StepBatch, block_q: int) -> torch.Tensor:
    """Cut the sequences with more than one token into tiles. Returns: [most tiles that T tokens can make, 8] int32."""
    num_seqs = batch.num_seqs
    num_tiles = batch.num_tokens // block_q + min(num_seqs, batch.num_tokens // 2)
    tiles = torch.empty(num_tiles, COLUMNS.value, dtype=torch.int32, device=batch.seq_lens.device)
    _plan_tiles[(triton.cdiv(num_tiles, _PER_PROGRAM),)](
        tiles,
        batch.cu_seqlens,
        batch.seq_lens,
        batch.seq_row,
        num_seqs,
        num_tiles,
        BLOCK_Q=block_q,
        PER_PROGRAM=_PER_PROGRAM,
        BLOCK_S=triton.next_power_of_2(num_seqs),
    )
    return tiles


@triton.jit
def part_of(program: tl.tensor, units: tl.tensor, num_parts: tl.tensor) -> tl.tensor:
    """Where a program's part of the line begins."""
    return (program.to(tl.int64) * units // num_parts).to(tl.int32)


@triton.jit
def program_of(unit: tl.tensor, units: tl.tensor, num_parts: tl.tensor) -> tl.tensor:
    """In whose part a unit of the line is: the inverse of `part_of`."""
    return (((unit.to(tl.int64) + 1) * num_parts - 1) // units).to(tl.int32)


@triton.jit
def _plan_decodes(
    entries: tl.tensor,
    programs: tl.tensor,
    cu_seqlens: tl.tensor,
    seq_lens: tl.tensor,
    seq_row: tl.tensor,
    num_seqs: tl.tensor,
    EVERY_TOKEN: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    UNIT: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
    PER_PROGRAM: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    index = tl.arange(0, BLOCK_S)
    start = tl.load(cu_seqlens + index, mask=index < num_seqs, other=0)
    if EVERY_TOKEN:
        num_tokens = tl.load(cu_seqlens + num_seqs)
        token = index
        exists = token < num_tokens
        sequence = index
        if tl.max(tl.where(exists & (start != token), 1, 0), 0) > 0:  # not a token of each: some have more
            sequence = tl.zeros_like(index)
            for other in range(num_seqs):
                sequence += (tl.load(cu_seqlens + other + 1) <= token).to(tl.int32)
        stop = tl.load(cu_seqlens + sequence + 1, mask=exists, other=0)
        end = tl.load(seq_lens + sequence, mask=exists, other=0) - (stop - 1 - token)
    else:
        token = start
        sequence = index
        stop = tl.load(cu_seqlens + index + 1, mask=index < num_seqs, other=0)
        exists = stop - start == 1
        end = tl.load(seq_lens + sequence, mask=exists, other=0)
    begin = tl.zeros_like(end)
    if WINDOW > 0:
        begin = tl.maximum(end - WINDOW, 0)
    num_units = tl.where(exists, (end - begin + UNIT - 1) // UNIT, 0)
    unit_end = tl.cumsum(num_units, 0)
    num_units_of_all = tl.sum(num_units, 0)

    if tl.program_id(0) == 0:
        entry = entries + (tl.cumsum(exists.to(tl.int32), 0) - 1) * COLUMNS
        tl.store(entry + ENTRY_TOKEN, token, mask=exists)
        tl.store(entry + ENTRY_ROW, tl.load(seq_row + sequence, mask=exists, other=0), mask=exists)
        tl.store(entry + ENTRY_BEGIN, begin, mask=exists)
        tl.store(entry + ENTRY_END, end, mask=exists)
        tl.store(entry + ENTRY_UNIT, unit_end - num_units, mask=exists)
        tl.store(programs + NUM_PROGRAMS, num_units_of_all)

    units = num_units_of_all.to(tl.int64) * NUM_KV_HEADS
    num_parts = tl.maximum(tl.minimum(units, NUM_PROGRAMS), 1)
    program = tl.program_id(0) * PER_PROGRAM + tl.arange(0, PER_PROGRAM)
    first_unit = part_of(program, units, num_parts)
    is_before = exists[None, :] & (unit_end[None, :].to(tl.int64) * NUM_KV_HEADS <= first_unit[:, None])
    tl.store(programs + program, tl.sum(is_before.to(tl.int32), 1), mask=program < NUM_PROGRAMS)


@triton.jit
def _plan_tiles(
    tiles: tl.tensor,
    cu_seqlens: tl.tensor,
    seq_lens: tl.tensor,
    seq_row: tl.tensor,
    num_seqs: tl.tensor,
    num_tiles: tl.tensor,
    BLOCK_Q: tl.constexpr,
    PER_PROGRAM: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    index = tl.arange(0, BLOCK_S)
    start = tl.load(cu_seqlens + index, mask=index < num_seqs, other=0)
    stop = tl.load(cu_seqlens + index + 1, mask=index < num_seqs, other=0)
    num_own = tl.where(stop - start > 1, (stop - start + BLOCK_Q - 1) // BLOCK_Q, 0)
    tile_end = tl.cumsum(num_own, 0)

    number = tl.program_id(0) * PER_PROGRAM + tl.arange(0, PER_PROGRAM)
    is_before = (tile_end[None, :] <= number[:, None]) & (index < num_seqs)[None, :]
    sequence = tl.sum(is_before.to(tl.int32), 1)
    exists = sequence < num_seqs
    start = tl.load(cu_seqlens + sequence, mask=exists, other=0)
    stop = tl.load(cu_seqlens + sequence + 1, mask=exists, other=0)
    offset = (number - tl.sum(tl.where(is_before, num_own[None, :], 0), 1)) * BLOCK_Q
    position = tl.load(seq_lens + sequence, mask=exists, other=0) - (stop - start) + offset
    tile = tiles + number * COLUMNS
    is_mine = number < num_tiles
    tl.store(tile + TILE_TOKEN, start + offset, mask=is_mine)
    tl.store(tile + TILE_STOP, stop, mask=is_mine)
    tl.store(tile + TILE_ROW, tl.load(seq_row + sequence, mask=exists, other=0), mask=is_mine)
    tl.store(tile + TILE_POSITION, position, mask=is_mine)
