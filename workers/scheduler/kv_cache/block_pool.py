"""The pool of KV blocks: which are free, in use or idle, and which can be found by their hash.

A block is *free*, *in use* by one or more sequences, or *idle*: no sequence uses it, but its contents are cached under
a hash (`ipc/block_hash.py`), by which a later sequence may find it. Idle blocks count as free. The pool hands them out
only when no other block is left, the least recently used one first.

A freed block may be handed out again at once, although published steps may still write to it. Steps run in ticket order
on one stream, so these writes come before any later step's use.

Knows nothing of tokens or sequences, and does not judge when a block may be cached. Every operation takes many blocks
and is a fixed handful of array operations, however many blocks a prompt has.
"""

from __future__ import annotations

import numpy as np

from workers.scheduler.array_types import HashArray, Int32Array, IntArray
from workers.scheduler.kv_cache.block_index import BlockIndex


class BlockPool:
    """A stack of free blocks, a queue of idle ones, and an index of all cached ones, idle or in use."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 1, "a KV cache needs a block"
        self.num_blocks = num_blocks
        self.reset()

    def reset(self) -> None:
        """All blocks are free and none is cached, as at the beginning."""
        num_blocks = self.num_blocks
        self._stack = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)  # [num_blocks]; block 0 goes first
        self._num_stacked = num_blocks
        self._num_users = np.zeros(num_blocks, np.int32)  # [num_blocks], number of sequences that hold each
        self._last_freed = np.zeros(num_blocks, np.int64)  # [num_blocks], scratch space of `_drop_users`
        self._index = BlockIndex(num_blocks)
        self._idle = IdleBlocks(num_blocks)

    @property
    def num_free(self) -> int:
        """Number of blocks that `allocate` can hand out."""
        return self._num_stacked + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Number of blocks that `find` can return, idle or in use."""
        return len(self._index)

    def allocate(self, count: int) -> Int32Array:
        """Hand out `count` blocks; the caller has checked `num_free`."""
        assert count <= self.num_free, f"{count} KV blocks wanted, {self.num_free} free"
        if count > self._num_stacked:
            evicted = self._idle.take_oldest(count - self._num_stacked)
            self._index.remove(evicted)
            self._push(evicted)
        self._num_stacked -= count
        blocks = self._stack[self._num_stacked : self._num_stacked + count].copy()
        self._num_users[blocks] = 1
        return blocks

    def free(self, blocks: Int32Array) -> None:
        """Take blocks back from sequences. A block occurs once for each sequence that gives it back.

        Cached blocks without a user become idle; the first of `blocks` will be evicted first.
        """
        left = self._num_users[blocks] - 1
        assert left.size == 0 or left.min() >= 0, "a KV block was freed twice"
        if left.any():
            blocks = self._drop_users(blocks)
        else:
            self._num_users[blocks] = 0
        are_cached = self._index.contains(blocks)
        if are_cached.all():
            self._idle.add(blocks)
        else:
            self._idle.add(blocks[are_cached])
            self._push(blocks[~are_cached])

    def _drop_users(self, blocks: Int32Array) -> Int32Array:
        """Count down the users of blocks, some of which are shared. Returns the blocks without a user, each once."""
        np.subtract.at(self._num_users, blocks, 1)
        left = self._num_users[blocks]
        assert left.min() >= 0, "a KV block was freed twice"
        unused: Int32Array = blocks[left == 0]
        self._last_freed[unused] = order = np.arange(len(unused))
        is_last = self._last_freed[unused] == order  # several sequences may free one block together
        return unused if is_last.all() else unused[is_last]

    def find(self, hashes: HashArray) -> Int32Array:
        """The blocks of the longest cached beginning of this chain of hashes."""
        return self._index.find(hashes)

    def num_in_use(self, blocks: Int32Array) -> int:
        """How many of these blocks do not count as free."""
        return int(np.count_nonzero(self._num_users[blocks])) if len(blocks) else 0

    def share(self, blocks: Int32Array) -> None:
        """One more sequence uses these blocks, which `find` has returned."""
        num_users = self._num_users[blocks]
        self._num_users[blocks] = num_users + 1
        self._idle.remove(blocks[num_users == 0])

    def offer(self, blocks: Int32Array, hashes: HashArray) -> None:
        """Let `find` return these blocks, which are in use, for these hashes. A hash that has a block keeps it."""
        self._index.add(blocks, hashes)

    def withdraw(self, hashes: HashArray) -> None:
        """Let `find` return no block for these hashes any more. Sequences that use such a block keep it."""
        blocks = self._index.find_all(hashes)
        self._index.remove(blocks)
        idle = blocks[self._num_users[blocks] == 0]
        self._idle.remove(idle)
        self._push(idle)

    def clear(self) -> None:
        """Forget all hashes. Idle blocks become free ones."""
        self._index.clear()
        self._push(self._idle.take_oldest(len(self._idle)))

    def _push(self, blocks: Int32Array) -> None:
        self._stack[self._num_stacked : self._num_stacked + len(blocks)] = blocks
        self._num_stacked += len(blocks)


class IdleBlocks:
    """A queue from whose middle blocks can be removed: a log of additions, in which only a block's last entry is valid.

    Removing a block only makes its entry invalid. Invalid entries are skipped at the front, and dropped when the log is
    full and is compacted. Both cost constant time for each addition.
    """

    def __init__(self, num_blocks: int) -> None:
        self._log = np.zeros(2 * num_blocks, np.int32)  # entries [start, end), the oldest first
        self._start = self._end = 0
        self._entry = np.full(num_blocks, -1, np.int64)  # [num_blocks], index of each block's valid entry; -1 = none
        self._num = 0

    def __len__(self) -> int:
        return self._num

    def add(self, blocks: Int32Array) -> None:
        """Append blocks in this order."""
        if self._end + len(blocks) > len(self._log):
            self._compact()
        end = self._end + len(blocks)
        self._log[self._end : end] = blocks
        self._entry[blocks] = np.arange(self._end, end)
        self._end = end
        self._num += len(blocks)

    def remove(self, blocks: Int32Array) -> None:
        self._entry[blocks] = -1
        self._num -= len(blocks)

    def take_oldest(self, count: int) -> Int32Array:
        """Remove and return the first `count` blocks; the queue must hold that many."""
        taken = self._log[:0]
        while len(taken) < count:
            assert self._start < self._end, f"{count} idle blocks wanted, {len(taken)} there"
            end = min(self._start + 2 * (count - len(taken)), self._end)
            valid = self._valid(self._start, end)[: count - len(taken)]
            self._start = int(valid[-1]) + 1 if len(taken) + len(valid) == count else end
            taken = np.concatenate((taken, self._log[valid]))
        self.remove(taken)
        return taken

    def _valid(self, start: int, end: int) -> IntArray:
        """Indices of the valid entries in [start, end)."""
        is_valid = self._entry[self._log[start:end]] == np.arange(start, end)
        valid: IntArray = is_valid.nonzero()[0]
        valid += start
        return valid

    def _compact(self) -> None:
        """Drop all invalid entries."""
        blocks = self._log[self._valid(self._start, self._end)]
        self._start, self._end = 0, len(blocks)
        self._log[: len(blocks)] = blocks
        self._entry[blocks] = np.arange(len(blocks))
