"""Plans a step's attention on the device: divides its decodes into parts and its prefills into tiles.

The kernels read the lengths on the device, so that one captured graph serves batches of any lengths.

Decodes. An entry is one query token and the KV it sees, cut into units of UNIT positions. The units of all entries form
one line, and the plan cuts the line into contiguous parts of equal length:

    entries   |--------- 0 ---------|- 1 -|- 2 -|------- 3 -------|
    parts     |---- 0 ----|---- 1 ----|---- 2 ----|---- 3 ----|...

So a long sequence spans many parts, and many short sequences share one. Stream-K divides matrix products in the same
way (Osama et al., 2023). Each part has one program per KV head. The programs of a part read the heads of the same
tokens, which are neighbours in memory, at about the same time.

Prefills. A tile is up to BLOCK_Q consecutive tokens of one sequence.

In a bucket with as many tokens as sequences, every token is an entry. In other buckets each sequence with one token in
the step is an entry, and the other sequences are cut into tiles.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from workers.gpu.execution.step_batch import StepBatch

# Columns of the tables. A row has 8 integers, which is one sector of memory (32 bytes).
ENTRY_TOKEN = tl.constexpr(0)  # in the packed batch
ENTRY_ROW = tl.constexpr(1)  # of the block table
ENTRY_BEGIN = tl.constexpr(2)  # first KV position it sees
ENTRY_END = tl.constexpr(3)  # end of that range; the token's own position is the last in it
ENTRY_UNIT = tl.constexpr(4)  # its first, on the line
ENTRY_PART = tl.constexpr(5)  # the part in which it begins
ENTRY_LAST_PART = tl.constexpr(6)  # the part in which it ends; a row without an entry begins and ends in part 0
ENTRY_IS_WHOLE = tl.constexpr(7)  # 1 = it begins where its first part begins
PART_UNIT = tl.constexpr(0)  # its first, on the line; the part ends where the next begins
PART_ENTRY = tl.constexpr(1)  # of that unit
CUT_TOKEN = tl.constexpr(2)  # the entry that begins in this part and ends in a later one; -1 = no such entry
CUT_PART = tl.constexpr(3)  # the part in which that entry ends
CUT_IS_WHOLE = tl.constexpr(4)  # 1 = that entry begins where this part begins
TILE_TOKEN = tl.constexpr(0)  # its first, in the packed batch
TILE_STOP = tl.constexpr(1)  # end of the sequence's tokens; 0 = the tile does not exist
TILE_ROW = tl.constexpr(2)
TILE_POSITION = tl.constexpr(3)  # of its first token
COLUMNS = tl.constexpr(8)

_PER_PROGRAM: Final = 16  # parts or tiles that one program of the planning kernels looks up


def plan_decodes(batch: StepBatch, *, window: int, unit: int, num_parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide the decodes of a step into at most `num_parts` parts. `window`: the sliding window; 0 = none.

    Returns: entries [S, 8] int32, rows without an entry last; and parts [num_parts + 1, 8] int32, empty parts last.
    """
    num_seqs = batch.num_seqs
    entries = torch.empty(num_seqs, COLUMNS.value, dtype=torch.int32, device=batch.seq_lens.device)
    parts = torch.empty(num_parts + 1, COLUMNS.value, dtype=torch.int32, device=batch.seq_lens.device)
    _plan_decodes[(triton.cdiv(num_parts + 1, _PER_PROGRAM),)](
        entries,
        parts,
        batch.cu_seqlens,
        batch.seq_lens,
        batch.seq_row,
        num_seqs,
        EVERY_TOKEN=batch.num_tokens == num_seqs,
        WINDOW=window,
        UNIT=unit,
        MAX_PARTS=num_parts,
        PER_PROGRAM=_PER_PROGRAM,
        BLOCK_S=triton.next_power_of_2(num_seqs),
    )
    return entries, parts


def plan_tiles(batch: StepBatch, block_q: int) -> torch.Tensor:
    """Cut the sequences with more than one token into tiles of `block_q` tokens.

    Returns: [the most tiles that T tokens can make, 8] int32.
    """
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
def _first_unit(part: tl.tensor, num_units: tl.tensor, num_parts: tl.tensor) -> tl.tensor:
    return tl.where(part < num_parts, part * num_units // num_parts, num_units)


@triton.jit
def _part_of(unit: tl.tensor, num_units: tl.tensor, num_parts: tl.tensor) -> tl.tensor:
    return ((unit + 1) * num_parts - 1) // tl.maximum(num_units, 1)


@triton.jit
def _plan_decodes(
    entries: tl.tensor,
    parts: tl.tensor,
    cu_seqlens: tl.tensor,
    seq_lens: tl.tensor,
    seq_row: tl.tensor,
    num_seqs: tl.tensor,
    EVERY_TOKEN: tl.constexpr,
    WINDOW: tl.constexpr,
    UNIT: tl.constexpr,
    MAX_PARTS: tl.constexpr,
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
        if tl.max(tl.where(exists & (start != token), 1, 0), 0) > 0:  # not every sequence has one token
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
    own_units = tl.where(exists, (end - begin + UNIT - 1) // UNIT, 0)
    unit_end = tl.cumsum(own_units, 0)
    unit = unit_end - own_units
    num_units = tl.sum(own_units, 0)

    num_parts = tl.maximum(tl.minimum(num_units, MAX_PARTS), 1)
    if tl.program_id(0) == 0:
        entry = entries + (tl.cumsum(exists.to(tl.int32), 0) - 1) * COLUMNS
        tl.store(entry + ENTRY_TOKEN, token, mask=exists)
        tl.store(entry + ENTRY_ROW, tl.load(seq_row + sequence, mask=exists, other=0), mask=exists)
        tl.store(entry + ENTRY_BEGIN, begin, mask=exists)
        tl.store(entry + ENTRY_END, end, mask=exists)
        tl.store(entry + ENTRY_UNIT, unit, mask=exists)
        first_part = _part_of(unit, num_units, num_parts)
        is_whole = _first_unit(first_part, num_units, num_parts) == unit
        tl.store(entry + ENTRY_PART, first_part, mask=exists)
        tl.store(entry + ENTRY_LAST_PART, _part_of(unit_end - 1, num_units, num_parts), mask=exists)
        tl.store(entry + ENTRY_IS_WHOLE, is_whole.to(tl.int32), mask=exists)
        is_unused = (tl.sum(exists.to(tl.int32), 0) <= index) & (index < num_seqs)
        tl.store(entries + index * COLUMNS + ENTRY_PART, 0, mask=is_unused)
        tl.store(entries + index * COLUMNS + ENTRY_LAST_PART, 0, mask=is_unused)

    number = tl.program_id(0) * PER_PROGRAM + tl.arange(0, PER_PROGRAM)
    first = _first_unit(number, num_units, num_parts)
    is_before = exists[None, :] & (unit_end[None, :] <= first[:, None])
    after = _first_unit(number + 1, num_units, num_parts)  # find the entry in which the next part begins
    is_cut = (unit[None, :] < after[:, None]) & (after[:, None] < unit_end[None, :]) & (first[:, None] <= unit[None, :])
    cut_unit = tl.max(tl.where(is_cut, unit[None, :], -1), 1)
    cut_end = tl.max(tl.where(is_cut, unit_end[None, :], 0), 1)
    part = parts + number * COLUMNS
    is_mine = number <= MAX_PARTS
    tl.store(part + PART_UNIT, first, mask=is_mine)
    tl.store(part + PART_ENTRY, tl.sum(is_before.to(tl.int32), 1), mask=is_mine)
    tl.store(part + CUT_TOKEN, tl.max(tl.where(is_cut, token[None, :], -1), 1), mask=is_mine)
    tl.store(part + CUT_PART, _part_of(cut_end - 1, num_units, num_parts), mask=is_mine)
    tl.store(part + CUT_IS_WHOLE, (cut_unit == first).to(tl.int32), mask=is_mine)


@triton.jit(do_not_specialize=["num_tiles"])  # varies: else a step would compile
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
