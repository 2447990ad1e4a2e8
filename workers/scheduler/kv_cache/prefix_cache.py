"""Which cached blocks a sequence may begin with, and when its own blocks are offered to others.

A block of a row is *offered*, so that later sequences may find it, once it is full of known tokens and published steps
compute their KV: both `num_tokens` (applied) and `num_computed_tokens` (planned) have reached the block's end. Two
reasons make this safe:

- Steps run in ticket order, so a step that is planned later reads the block after its KV has been written.
- Tokens that a step in flight samples are not known yet. So no block is offered that contains tokens past a stop.

The planner offers full blocks at the end of each plan, for the step that it is about to publish. It offers the prompt
of several samples earlier, within the plan, so that the samples can share it in the same step.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from ipc.block_hash import next_hashes
from workers.scheduler.array_types import HashArray, Int32Array, IntArray
from workers.scheduler.kv_cache.block_pool import BlockPool
from workers.scheduler.kv_cache.block_tables import BlockTables, spans
from workers.scheduler.sequence import Sequence
from workers.scheduler.sequence_table import SequenceTable

NEVER: Final = 2**62
_NO_BLOCKS: Final[Int32Array] = np.empty(0, np.int32)


class PrefixCache:
    """The hashes of every row's blocks, over the pool that finds blocks by hash."""

    def __init__(self, pool: BlockPool, tables: BlockTables, table: SequenceTable) -> None:
        num_rows, max_blocks = tables.table.shape
        self._pool = pool
        self._tables = tables
        self._table = table
        self._size = tables.block_size
        self._hashes: HashArray = np.zeros((num_rows, max_blocks + 1, 2), np.uint64)  # of each row; the root in front
        self._num_hashed = np.zeros(num_rows, np.int64)  # [num_rows], number of blocks with a hash in `_hashes`
        self._next_full = np.full(num_rows, NEVER, np.int64)  # [num_rows], length at which the next block is offered

    def find(self, sequence: Sequence, num_known: int) -> Int32Array:
        """Cached blocks with the KV of the first tokens of a waiting or preempted sequence.

        They never cover all of its `num_known` tokens: at least one is left to compute.
        """
        if sequence.block_hashes is None or self._table.wants_prompt_logprobs(sequence):
            return _NO_BLOCKS
        end, row = (num_known - 1) // self._size, sequence.row
        if not sequence.has_row:
            return self._pool.find(sequence.block_hashes[1 : end + 1])
        end = min(end, int(self._table.num_tokens[row]) // self._size)  # a step in flight may sample the last tokens
        self._hash_blocks(np.array([row]), np.array([end]))
        return self._pool.find(self._hashes[row, 1 : end + 1])

    def set_prompt_hashes(self, sequence: Sequence) -> None:
        """Take over the prompt's hashes of a sequence that has just got its row."""
        hashes = sequence.block_hashes
        if hashes is not None:
            self._hashes[sequence.row, : len(hashes)] = hashes
            self._num_hashed[sequence.row] = len(hashes) - 1

    def begin(self, sequence: Sequence, found: Int32Array) -> None:
        """Give `found` blocks to a sequence that has a row and holds no blocks."""
        if sequence.block_hashes is None:
            self._next_full[sequence.row] = NEVER
            return
        self._next_full[sequence.row] = (len(found) + 1) * self._size
        if len(found):
            self._tables.begin_with(sequence.row, found)

    def offer_full(self, rows: IntArray) -> None:
        """Offer the blocks of `rows` that have become full, now that the step that computes them is being published."""
        table = self._table
        filled = np.minimum(table.num_computed_tokens[rows], table.num_tokens[rows])
        due = (filled >= self._next_full[rows]).nonzero()[0]
        if not due.size:
            return
        rows, ends = rows[due], filled[due] // self._size
        self._hash_blocks(rows, ends)
        first = self._next_full[rows] // self._size - 1
        counts = ends - first
        row, index = spans(rows, first, counts, int(counts.sum()))
        self._pool.offer(self._tables.table[row, index], self._hashes[row, index + 1])
        self._next_full[rows] = (ends + 1) * self._size

    def offer_prompt(self, sequence: Sequence) -> None:
        """Offer the prompt's full blocks to sequences that join the same step, which computes all of the prompt.

        This is safe because in each layer a step writes the KV of all its tokens before any of them reads.
        """
        row, end = sequence.row, sequence.num_prompt // self._size
        if not self.has_offered_prompt(sequence):
            first = int(self._next_full[row]) // self._size - 1
            self._pool.offer(self._tables.table[row, first:end], self._hashes[row, first + 1 : end + 1])
            self._next_full[row] = (end + 1) * self._size

    def has_offered_prompt(self, sequence: Sequence) -> bool:
        """Whether all full blocks of a running sequence's prompt have been offered, or none will be any more."""
        return bool(self._next_full[sequence.row] > sequence.num_prompt // self._size * self._size)

    def withdraw(self, sequence: Sequence) -> None:
        """Stop offering every block that a sequence with a row has computed or found: its KV may hold NaN.

        Looks the blocks up by hash, because the sequence may not hold them any more.
        """
        if sequence.block_hashes is not None:
            row = sequence.row
            end = int(self._table.num_tokens[row]) // self._size
            self._hash_blocks(np.array([row]), np.array([end]))
            self._pool.withdraw(self._hashes[row, 1 : end + 1])
            self._next_full[row] = NEVER

    def clear(self) -> None:
        """Forget all blocks. Blocks that rows hold now are never offered, nor are later blocks of these rows: the hash
        of a later block depends on blocks that are to be forgotten."""
        self._pool.clear()
        self._next_full[:] = NEVER

    def _hash_blocks(self, rows: IntArray, ends: IntArray) -> None:
        """Hash each row's blocks up to its end. The prompt's are hashed already; each turn hashes one block per row."""
        while (lacking := self._num_hashed[rows] < ends).any():
            rows, ends = rows[lacking], ends[lacking]
            hashed = self._num_hashed[rows]
            hashes = next_hashes(self._hashes[rows, hashed], self._table.token_blocks[rows, hashed])
            self._hashes[rows, hashed + 1] = hashes
            self._num_hashed[rows] = hashed + 1
