"""Which blocks a sequence may begin with, and when its own are offered to others.

A row's block is offered once it is full of known tokens whose KV published steps compute: `num_tokens` (applied) and
`num_computed` (planned) both reach its end. A later step may then read it, since steps run in ticket order. Tokens that
a step in flight samples are not known yet, so nothing past a stop is ever named. The scheduler offers at the end of a
plan, for the step that it is about to publish.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from ipc.block_hash import next_hash
from workers.scheduler.blocks import BlockPool, BlockTables, IntArray
from workers.scheduler.request import Request
from workers.scheduler.rows import Rows

NEVER: Final = 2**62


class PrefixCache:
    """Names of blocks by row, over the pool that keeps them."""

    def __init__(self, pool: BlockPool, tables: BlockTables, rows: Rows) -> None:
        self._pool = pool
        self._tables = tables
        self._rows = rows
        self._size = tables.block_size
        self._next_full = np.full(len(rows.requests), NEVER, np.int64)  # [num_rows], length at which a block is due

    def find(self, request: Request, num_known: int) -> list[int]:
        """Blocks with the KV of a request's first tokens; at least one of its `num_known` is left to compute."""
        if not request.block_hashes:
            return []
        return self._pool.find(request.block_hashes[1 : 1 + (num_known - 1) // self._size])

    def begin(self, request: Request, found: list[int]) -> int:
        """Give found blocks to a request that holds a row and no blocks; returns how many tokens they hold."""
        if not request.block_hashes:
            self._next_full[request.row] = NEVER
            return 0
        self._next_full[request.row] = (len(found) + 1) * self._size
        if found:
            self._tables.begin_with(request.row, found)
        return len(found) * self._size

    def offer_full(self, rows: IntArray) -> None:
        """Offer the blocks that got full, now that the step that computes `rows` is being published."""
        columns = self._rows
        filled = np.minimum(columns.num_computed[rows], columns.num_tokens[rows])
        due = (filled >= self._next_full[rows]).nonzero()[0]
        for row, length in zip(rows[due].tolist(), filled[due].tolist(), strict=True):
            request = columns.requests[row]
            assert request is not None, f"row {row} runs for nobody"
            hashes = request.block_hashes
            first, end = int(self._next_full[row]) // self._size - 1, length // self._size
            for i in range(len(hashes) - 1, end):  # beyond the prompt's own
                block = columns.token_ids[row, i * self._size : (i + 1) * self._size]
                hashes.append(next_hash(hashes[-1], block.tobytes()))
            for i, block in enumerate(self._tables.table[row, first:end].tolist(), first):
                self._pool.offer(block, hashes[i + 1])
            self._next_full[row] = (end + 1) * self._size

    def clear(self) -> None:
        """Forget everything, and what rows hold now for good: their later blocks depend on what is to be forgotten."""
        self._pool.clear()
        self._next_full[:] = NEVER
