"""Which blocks each row holds: the scheduler's side of the block tables on the device."""

from __future__ import annotations

import numpy as np

from workers.scheduler.array_types import Int32Array, IntArray
from workers.scheduler.kv_cache.block_pool import BlockPool


class BlockTables:
    """The blocks of every row, in order of position.

    table: [num_rows, max_blocks_per_seq] int32; the first `num_blocks[row]` entries of a row are valid.
    num_blocks: [num_rows] int64.
    """

    def __init__(self, pool: BlockPool, num_rows: int, max_blocks_per_seq: int, block_size: int) -> None:
        self.pool = pool
        self.block_size = block_size
        self.table = np.zeros((num_rows, max_blocks_per_seq), np.int32)
        self.num_blocks = np.zeros(num_rows, np.int64)  # [num_rows]
        self._capacity = np.zeros(num_rows, np.int64)  # [num_rows], tokens that fit; saves a division per row and step

    def missing(self, rows: IntArray, lengths: IntArray) -> tuple[IntArray, IntArray, int]:
        """What `rows` lack to hold `lengths` tokens: the rows that lack blocks, the number that each lacks, the sum."""
        short = (lengths > self._capacity[rows]).nonzero()[0]
        if not short.size:
            return short, short, 0
        rows, lengths = rows[short], lengths[short]
        counts = -(-lengths // self.block_size) - self.num_blocks[rows]
        return rows, counts, int(counts.sum())

    def extend(self, rows: IntArray, counts: IntArray, total: int) -> tuple[IntArray, IntArray, Int32Array]:
        """Give each row its count of new blocks. Returns the new entries: row, index and block, [total] each."""
        blocks = self.pool.allocate(total)
        first = self.num_blocks[rows]
        row, index = spans(rows, first, counts, total)
        self.table[row, index] = blocks
        held = first + counts
        self.num_blocks[rows] = held
        self._capacity[rows] = held * self.block_size
        return row, index, blocks

    def begin_with(self, row: int, blocks: Int32Array) -> None:
        """Let a row without blocks begin with these found blocks, which other rows may hold too."""
        assert self.num_blocks[row] == 0, f"row {row} holds blocks already"
        self.pool.share(blocks)
        self.table[row, : len(blocks)] = blocks
        self.num_blocks[row] = len(blocks)
        self._capacity[row] = len(blocks) * self.block_size

    def free_rows(self, rows: list[int]) -> None:
        """Free all blocks of these rows, the last block of a row first. A row may hold none."""
        counts = self.num_blocks[rows].tolist()
        self.pool.free(np.concatenate([self.table[row, :n][::-1] for row, n in zip(rows, counts, strict=True)]))
        self.num_blocks[rows] = 0
        self._capacity[rows] = 0

    def reset(self) -> None:
        """No row holds a block."""
        self.num_blocks[:] = 0
        self._capacity[:] = 0

    def blocks_for(self, num_tokens: int) -> int:
        """Number of blocks that `num_tokens` tokens fill or begin."""
        return -(-num_tokens // self.block_size)


def spans(rows: IntArray, first: IntArray, counts: IntArray, total: int) -> tuple[IntArray, IntArray]:
    """List `counts` consecutive indices for each row, from `first` on: row and index, [total] each."""
    if total == len(rows):  # one for each row: the decode case
        return rows, first
    return rows.repeat(counts), np.arange(total) - (counts.cumsum() - counts - first).repeat(counts)
