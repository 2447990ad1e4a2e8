"""Which blocks a sequence may begin with, and when its own are offered to others.

A row's block is offered once it is full of known tokens whose KV published steps compute: `num_tokens` (applied) and
`num_computed` (planned) both reach its end. A later step may then read it, since steps run in ticket order. Tokens that
a step in flight samples are not known yet, so nothing past a stop is ever named. The scheduler offers at the end of a
plan, for the step that it is about to publish; the prompt of several samples within it, so that they share it at once.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from ipc.block_hash import next_hashes
from workers.scheduler.admission.request import Request
from workers.scheduler.array_types import Int32Array, IntArray, NameArray
from workers.scheduler.blocks import BlockPool, BlockTables, spans
from workers.scheduler.sequence_table import SequenceTable

NEVER: Final = 2**62
_NONE: Final[Int32Array] = np.empty(0, np.int32)


class PrefixCache:
    """Names of blocks by row, over the pool that keeps them."""

    def __init__(self, pool: BlockPool, tables: BlockTables, rows: SequenceTable) -> None:
        num_rows, max_blocks = tables.table.shape
        self._pool = pool
        self._tables = tables
        self._rows = rows
        self._size = tables.block_size
        self._names: NameArray = np.zeros((num_rows, max_blocks + 1, 2), np.uint64)  # of each row; the root in front
        self._num_named = np.zeros(num_rows, np.int64)  # [num_rows], blocks with a name in `_names`
        self._next_full = np.full(num_rows, NEVER, np.int64)  # [num_rows], length at which a block is due

    def find(self, request: Request, num_known: int) -> Int32Array:
        """Blocks with the KV of a request's first tokens; at least one of its `num_known` is left to compute."""
        if request.names is None:
            return _NONE
        end, row = (num_known - 1) // self._size, request.row
        if not request.has_row:
            return self._pool.find(request.names[1 : end + 1])
        end = min(end, int(self._rows.num_tokens[row]) // self._size)  # a step in flight may sample the last tokens
        self._name(np.array([row]), np.array([end]))
        return self._pool.find(self._names[row, 1 : end + 1])

    def enter(self, request: Request) -> None:
        """A request has got its row."""
        names = request.names
        if names is not None:
            self._names[request.row, : len(names)] = names
            self._num_named[request.row] = len(names) - 1

    def begin(self, request: Request, found: Int32Array) -> int:
        """Give found blocks to a request that holds a row and no blocks; returns how many tokens they hold."""
        if request.names is None:
            self._next_full[request.row] = NEVER
            return 0
        self._next_full[request.row] = (len(found) + 1) * self._size
        if len(found):
            self._tables.begin_with(request.row, found)
        return len(found) * self._size

    def offer_full(self, rows: IntArray) -> None:
        """Offer the blocks that got full, now that the step that computes `rows` is being published."""
        columns = self._rows
        filled = np.minimum(columns.num_computed[rows], columns.num_tokens[rows])
        due = (filled >= self._next_full[rows]).nonzero()[0]
        if not due.size:
            return
        rows, ends = rows[due], filled[due] // self._size
        self._name(rows, ends)
        first = self._next_full[rows] // self._size - 1
        counts = ends - first
        row, index = spans(rows, first, counts, int(counts.sum()))
        self._pool.offer(self._tables.table[row, index], self._names[row, index + 1])
        self._next_full[rows] = (ends + 1) * self._size

    def offer_prompt(self, request: Request) -> None:
        """Offer the blocks of a prompt to whoever is planned behind it into the same step, which computes all of it.

        In each layer a step writes the KV of all its tokens before any of them reads.
        """
        row, end = request.row, request.num_prompt // self._size
        if not self.has_offered_prompt(request):
            first = int(self._next_full[row]) // self._size - 1
            self._pool.offer(self._tables.table[row, first:end], self._names[row, first + 1 : end + 1])
            self._next_full[row] = (end + 1) * self._size

    def has_offered_prompt(self, request: Request) -> bool:
        """Whether nothing of a running request's prompt is left to be offered."""
        return bool(self._next_full[request.row] > request.num_prompt // self._size * self._size)

    def withdraw(self, request: Request) -> None:
        """Drop the names of all blocks that a request with a row has computed or found: their KV may hold NaN.

        Goes by name, because the request may not hold these blocks any more.
        """
        if request.names is not None:
            row = request.row
            end = int(self._rows.num_tokens[row]) // self._size
            self._name(np.array([row]), np.array([end]))
            self._pool.withdraw(self._names[row, 1 : end + 1])
            self._next_full[row] = NEVER

    def _name(self, rows: IntArray, ends: IntArray) -> None:
        """Name each row's blocks up to its end: those beyond its prompt's, one for each row and turn."""
        while (lacking := self._num_named[rows] < ends).any():
            rows, ends = rows[lacking], ends[lacking]
            named = self._num_named[rows]
            names = next_hashes(self._names[rows, named], self._rows.token_blocks[rows, named])
            self._names[rows, named + 1] = names
            self._num_named[rows] = named + 1

    def clear(self) -> None:
        """Forget everything, and what rows hold now for good: their later blocks depend on what is to be forgotten."""
        self._pool.clear()
        self._next_full[:] = NEVER
