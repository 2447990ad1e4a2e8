"""The pool of KV blocks, what is cached in them, and which sequence holds which of them.

A block is free, in use by one or more sequences, or idle: used by nobody, but its contents have a name
(`ipc/block_hash.py`) under which the next sequence may find them. Idle blocks count as free; the one unused for longest
is handed out first when no other is left. Knows nothing of tokens or requests, and does not judge when a block may be
offered under a name. A block that is freed may be handed out again at once, because steps run in ticket order on one
stream: whatever a published step still writes there comes before any later step's use.

Everything is done to many blocks at once: a handful of array operations for a prompt, however long.
"""

from __future__ import annotations

import numpy as np

from workers.scheduler.array_types import Int32Array, IntArray, NameArray
from workers.scheduler.block_index import BlockIndex


class BlockPool:
    """Free blocks as a stack, idle ones in the order in which they got idle, and the names of idle and used ones."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 1, "a KV cache needs a block"
        self.num_blocks = num_blocks
        self._stack = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)  # [num_blocks]; block 0 goes first
        self._num_stacked = num_blocks
        self._num_users = np.zeros(num_blocks, np.int32)  # [num_blocks], sequences that hold each
        self._last_given = np.zeros(num_blocks, np.int64)  # [num_blocks], scratch of `_leave`
        self._names = BlockIndex(num_blocks)
        self._idle = IdleBlocks(num_blocks)

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give."""
        return self._num_stacked + len(self._idle)

    @property
    def num_cached(self) -> int:
        return len(self._names)

    def allocate(self, count: int) -> Int32Array:
        """Take `count` blocks; the caller has made sure that they are there."""
        assert count <= self.num_free, f"{count} KV blocks wanted, {self.num_free} free"
        if count > self._num_stacked:
            evicted = self._idle.take_oldest(count - self._num_stacked)
            self._names.forget(evicted)
            self._push(evicted)
        self._num_stacked -= count
        blocks = self._stack[self._num_stacked : self._num_stacked + count].copy()
        self._num_users[blocks] = 1
        return blocks

    def free(self, blocks: Int32Array) -> None:
        """Sequences give up their blocks. A block occurs once for each of them; of those that get idle, the first given
        will be the first to go."""
        left = self._num_users[blocks] - 1
        assert left.size == 0 or left.min() >= 0, "a KV block was freed twice"
        if left.any():
            blocks = self._leave(blocks)
        else:
            self._num_users[blocks] = 0
        are_named = self._names.are_named(blocks)
        if are_named.all():
            self._idle.add(blocks)
        else:
            self._idle.add(blocks[are_named])
            self._push(blocks[~are_named])

    def _leave(self, blocks: Int32Array) -> Int32Array:
        """Count users where some are shared; returns those that nobody uses any more, each once."""
        np.subtract.at(self._num_users, blocks, 1)
        left = self._num_users[blocks]
        assert left.min() >= 0, "a KV block was freed twice"
        unused: Int32Array = blocks[left == 0]
        self._last_given[unused] = order = np.arange(len(unused))
        is_last = self._last_given[unused] == order  # several may have given up the same one
        return unused if is_last.all() else unused[is_last]

    def find(self, names: NameArray) -> Int32Array:
        """The blocks that hold the beginning of this chain, as far as it is cached."""
        return self._names.find(names)

    def num_in_use(self, blocks: Int32Array) -> int:
        """How many of these do not count as free."""
        return int(np.count_nonzero(self._num_users[blocks])) if len(blocks) else 0

    def share(self, blocks: Int32Array) -> None:
        """One more sequence holds these found blocks."""
        num_users = self._num_users[blocks]
        self._num_users[blocks] = num_users + 1
        self._idle.remove(blocks[num_users == 0])

    def offer(self, blocks: Int32Array, names: NameArray) -> None:
        """From now on `find` gives these blocks in use under these names, unless it gives others already."""
        self._names.enter(blocks, names)

    def withdraw(self, names: NameArray) -> None:
        """From now on `find` gives no block under these names. Sequences that hold such a block keep it."""
        blocks = self._names.find_all(names)
        self._names.forget(blocks)
        idle = blocks[self._num_users[blocks] == 0]
        self._idle.remove(idle)
        self._push(idle)

    def clear(self) -> None:
        """Forget all names; idle blocks are free and hold nothing."""
        self._names.clear()
        self._push(self._idle.take_oldest(len(self._idle)))

    def _push(self, blocks: Int32Array) -> None:
        self._stack[self._num_stacked : self._num_stacked + len(blocks)] = blocks
        self._num_stacked += len(blocks)


class IdleBlocks:
    """A queue that can be left from anywhere: a log of arrivals, in which only each block's last entry counts.

    Leaving is to forget where one stands. Entries that count for nothing go when they come to the front, or when the
    log is full and is closed up; each arrival pays for both once.
    """

    def __init__(self, num_blocks: int) -> None:
        self._log = np.zeros(2 * num_blocks, np.int32)  # [start, end) are entries, the oldest first
        self._start = self._end = 0
        self._entry = np.full(num_blocks, -1, np.int64)  # [num_blocks], where each block stands; -1 = it does not
        self._num = 0

    def __len__(self) -> int:
        return self._num

    def add(self, blocks: Int32Array) -> None:
        """To the end, in this order."""
        if self._end + len(blocks) > len(self._log):
            self._close_up()
        end = self._end + len(blocks)
        self._log[self._end : end] = blocks
        self._entry[blocks] = np.arange(self._end, end)
        self._end = end
        self._num += len(blocks)

    def remove(self, blocks: Int32Array) -> None:
        self._entry[blocks] = -1
        self._num -= len(blocks)

    def take_oldest(self, count: int) -> Int32Array:
        """Remove the `count` that came first; so many must be there."""
        taken = self._log[:0]
        while len(taken) < count:
            assert self._start < self._end, f"{count} idle blocks wanted, {len(taken)} there"
            end = min(self._start + 2 * (count - len(taken)), self._end)
            counting = self._counting(self._start, end)[: count - len(taken)]
            self._start = int(counting[-1]) + 1 if len(taken) + len(counting) == count else end
            taken = np.concatenate((taken, self._log[counting]))
        self.remove(taken)
        return taken

    def _counting(self, start: int, end: int) -> IntArray:
        """The entries in [start, end) that count."""
        counts = self._entry[self._log[start:end]] == np.arange(start, end)
        counting: IntArray = counts.nonzero()[0]
        counting += start
        return counting

    def _close_up(self) -> None:
        blocks = self._log[self._counting(self._start, self._end)]
        self._start, self._end = 0, len(blocks)
        self._log[: len(blocks)] = blocks
        self._entry[blocks] = np.arange(len(blocks))


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
        row, index = spans(rows, first, counts, total)
        self.table[row, index] = blocks
        held = first + counts
        self.num_blocks[rows] = held
        self._capacity[rows] = held * self.block_size
        return row, index, blocks

    def begin_with(self, row: int, blocks: Int32Array) -> None:
        """A row that holds nothing shares these found blocks with whoever else holds them."""
        assert self.num_blocks[row] == 0, f"row {row} holds blocks already"
        self.pool.share(blocks)
        self.table[row, : len(blocks)] = blocks
        self.num_blocks[row] = len(blocks)
        self._capacity[row] = len(blocks) * self.block_size

    def free_rows(self, rows: list[int]) -> None:
        """Give up all blocks of these rows, ends before beginnings; a row may hold none."""
        counts = self.num_blocks[rows].tolist()
        self.pool.free(np.concatenate([self.table[row, :n][::-1] for row, n in zip(rows, counts, strict=True)]))
        self.num_blocks[rows] = 0
        self._capacity[rows] = 0

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks so many tokens fill or begin."""
        return -(-num_tokens // self.block_size)


def spans(rows: IntArray, first: IntArray, counts: IntArray, total: int) -> tuple[IntArray, IntArray]:
    """`counts` consecutive indices of each row, from `first` on, in a flat list (`total` in all): row and index."""
    if total == len(rows):  # one each: the decode case
        return rows, first
    return rows.repeat(counts), np.arange(total) - (counts.cumsum() - counts - first).repeat(counts)
