"""The pool of KV blocks, what is cached in them, and which sequence holds which of them.

A block is free, in use by one or more sequences, or idle: used by nobody, but its contents have a name
(`ipc/block_hash.py`) under which the next sequence may find them. Idle blocks count as free; the one unused for longest
is handed out first when no other is left. Knows nothing of tokens or requests, and does not judge when a block may be
offered under a name. A block that is freed may be handed out again at once, because steps run in ticket order on one
stream: whatever a published step still writes there comes before any later step's use.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

IntArray = np.ndarray[Any, np.dtype[np.int64]]
Int32Array = np.ndarray[Any, np.dtype[np.int32]]


class BlockPool:
    """Free block ids as a stack, idle ones as a queue. Taking and returning many blocks is a few array operations."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 1, "a KV cache needs a block"
        self.num_blocks = num_blocks
        self._stack = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)  # [num_blocks]; block 0 goes first
        self._num_stacked = num_blocks
        self._num_users = np.zeros(num_blocks, np.int32)  # [num_blocks], sequences that hold each
        self._is_named = np.zeros(num_blocks, bool)  # [num_blocks]
        self._name_of: dict[int, bytes] = {}  # named blocks, idle or in use
        self._block_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # named and used by nobody, the longest idle first

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give."""
        return self._num_stacked + len(self._idle)

    @property
    def num_cached(self) -> int:
        return len(self._name_of)

    def allocate(self, count: int) -> Int32Array:
        """Take `count` blocks; the caller has made sure that they are there."""
        assert count <= self.num_free, f"{count} KV blocks wanted, {self.num_free} free"
        if count > self._num_stacked:
            self._evict(count - self._num_stacked)
        self._num_stacked -= count
        blocks = self._stack[self._num_stacked : self._num_stacked + count].copy()
        self._num_users[blocks] = 1
        return blocks

    def free(self, blocks: Int32Array) -> None:
        """One sequence gives up its blocks, given in order of position: of those that get idle the last goes first."""
        assert (self._num_users[blocks] > 0).all(), "a KV block was freed twice"
        self._num_users[blocks] -= 1
        unused = blocks[self._num_users[blocks] == 0]
        is_named = self._is_named[unused]
        if is_named.any():
            self._idle.update(dict.fromkeys(unused[is_named][::-1].tolist()))
            unused = unused[~is_named]
        self._push(unused)

    def find(self, names: Sequence[bytes]) -> list[int]:
        """The blocks that hold the beginning of this chain, as far as it is cached."""
        blocks = []
        for name in names:
            block = self._block_of.get(name)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_idle(self, blocks: list[int]) -> int:
        """How many of these count as free."""
        return sum(block in self._idle for block in blocks)

    def share(self, blocks: list[int]) -> None:
        """One more sequence holds these found blocks."""
        for block in blocks:
            self._idle.pop(block, None)
        self._num_users[blocks] += 1

    def offer(self, block: int, name: bytes) -> None:
        """From now on `find` gives this block in use under this name, unless it gives another one already."""
        if name not in self._block_of and block not in self._name_of:
            self._block_of[name] = block
            self._name_of[block] = name
            self._is_named[block] = True

    def clear(self) -> None:
        """Forget all names; idle blocks are free and hold nothing."""
        self._block_of.clear()
        self._name_of.clear()
        self._is_named[:] = False
        self._push(np.fromiter(self._idle, np.int32, len(self._idle)))
        self._idle.clear()

    def _evict(self, count: int) -> None:
        evicted = [self._idle.popitem(last=False)[0] for _ in range(count)]
        for block in evicted:
            del self._block_of[self._name_of.pop(block)]
        self._is_named[evicted] = False
        self._push(np.array(evicted, np.int32))

    def _push(self, blocks: Int32Array) -> None:
        self._stack[self._num_stacked : self._num_stacked + len(blocks)] = blocks
        self._num_stacked += len(blocks)


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

    def begin_with(self, row: int, blocks: list[int]) -> None:
        """A row that holds nothing shares these found blocks with whoever else holds them."""
        assert self.num_blocks[row] == 0, f"row {row} holds blocks already"
        self.pool.share(blocks)
        self.table[row, : len(blocks)] = blocks
        self.num_blocks[row] = len(blocks)
        self._capacity[row] = len(blocks) * self.block_size

    def free_row(self, row: int) -> None:
        """Give up all blocks of one row; it may hold none."""
        count = int(self.num_blocks[row])
        self.pool.free(self.table[row, :count])
        self.num_blocks[row] = 0
        self._capacity[row] = 0

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks so many tokens fill or begin."""
        return -(-num_tokens // self.block_size)
