"""The pool of KV blocks and which sequence holds which of them.

Owns the free list and a host copy of every row's block table. Knows nothing of tokens or requests: it hands out blocks
and takes them back. A block that is freed may be handed out again at once, because steps run in ticket order on one
stream: whatever a published step still writes there comes before any later step's use.
"""

from __future__ import annotations

from typing import Any

import numpy as np

IntArray = np.ndarray[Any, np.dtype[np.int64]]
Int32Array = np.ndarray[Any, np.dtype[np.int32]]


class BlockPool:
    """Free block ids as a stack. Taking and returning many blocks is one array copy each."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 1, "a KV cache needs a block"
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self._stack = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)  # [num_blocks]; block 0 goes first

    def allocate(self, count: int) -> Int32Array:
        """Take `count` blocks; the caller has made sure that they are there."""
        assert count <= self.num_free, f"{count} KV blocks wanted, {self.num_free} free"
        self.num_free -= count
        return self._stack[self.num_free : self.num_free + count].copy()

    def free(self, blocks: Int32Array) -> None:
        assert self.num_free + len(blocks) <= self.num_blocks, "a KV block was freed twice"
        self._stack[self.num_free : self.num_free + len(blocks)] = blocks
        self.num_free += len(blocks)


class BlockTables:
    """The blocks of every row, in order of position. `num_blocks[row]` of `table[row]` are in use."""

    def __init__(self, pool: BlockPool, num_rows: int, max_blocks_per_seq: int, block_size: int) -> None:
        self.pool = pool
        self.block_size = block_size
        self.table = np.zeros((num_rows, max_blocks_per_seq), np.int32)
        self.num_blocks = np.zeros(num_rows, np.int64)  # [num_rows]
        self._capacity = np.zeros(num_rows, np.int64)  # [num_rows], tokens that fit: spares a division per row and step

    def missing(self, rows: IntArray, lengths: IntArray) -> tuple[IntArray, IntArray, int]:
        """What is needed so that each of `rows` has room for its length: the rows that lack blocks, how many blocks
        each, and the sum."""
        short = (lengths > self._capacity[rows]).nonzero()[0]
        if not short.size:
            return short, short, 0
        rows, lengths = rows[short], lengths[short]
        counts = -(-lengths // self.block_size) - self.num_blocks[rows]
        return rows, counts, int(counts.sum())

    def extend(self, rows: IntArray, counts: IntArray, total: int) -> tuple[IntArray, IntArray, Int32Array]:
        """Give each of `rows` `counts` blocks (`total` in all). Returns the new entries: row, index, block."""
        blocks = self.pool.allocate(total)
        first = self.num_blocks[rows]
        if total == len(rows):  # one each: the decode case
            row, index = rows, first
        else:
            row = rows.repeat(counts)
            index = np.arange(total) - (counts.cumsum() - counts - first).repeat(counts)
        self.table[row, index] = blocks
        held = first + counts
        self.num_blocks[rows] = held
        self._capacity[rows] = held * self.block_size
        return row, index, blocks

    def free_row(self, row: int) -> None:
        """Return all blocks of one row; it may hold none."""
        count = int(self.num_blocks[row])
        self.pool.free(self.table[row, :count])
        self.num_blocks[row] = 0
        self._capacity[row] = 0

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks so many tokens fill or begin."""
        return -(-num_tokens // self.block_size)
