"""The running batch: which rows run, oldest first, and how a step's token budget is dealt out among them."""

from __future__ import annotations

from typing import Final

import numpy as np

from workers.scheduler.array_types import IntArray

NO_ROWS: Final[IntArray] = np.empty(0, np.int64)


class RunningRows:
    """Rows in order of admission. Leaving costs a store; the order is closed up once, when it is next asked for."""

    def __init__(self, num_rows: int) -> None:
        self._runs = np.zeros(num_rows, bool)  # [num_rows]
        self._order = NO_ROWS  # replaced and never changed in place: steps in flight keep it
        self._has_left = False  # some row in `_order` does not run any more
        self._num = 0

    def __len__(self) -> int:
        return self._num

    def __contains__(self, row: int) -> bool:
        return bool(self._runs[row])

    def rows(self) -> IntArray:
        """All of them, oldest first. The array is nobody's to change."""
        if self._has_left:
            self._order = self._order[self._runs[self._order]]
            self._has_left = False
        return self._order

    def start(self, rows: list[int]) -> None:
        """New ones go to the end: all that run are older."""
        self._order = np.append(self.rows(), np.array(rows, np.int64))
        self._runs[rows] = True
        self._num += len(rows)

    def stop(self, rows: list[int]) -> None:
        self._runs[rows] = False
        self._has_left = True
        self._num -= len(rows)


def share_tokens(rows: IntArray, remaining: IntArray, budget: int, chunk: int) -> tuple[IntArray, IntArray, int]:
    """Deal out a step's token budget among rows, oldest first, of which each has `remaining` tokens to compute.

    Those with one (decodes) come first; prompts share the rest in order, cut into chunks, and beside decodes at most
    `chunk`. Returns rows and the tokens of each, decodes in front and rows that get none left out, and how many tokens
    are left for others' prompts.
    """
    if not rows.size:
        return rows, remaining, budget
    if remaining.max() == 1:
        if rows.size > budget:
            return rows[:budget], remaining[:budget], 0
        return rows, remaining, min(budget - rows.size, chunk)
    is_decode = remaining == 1
    decodes = rows[is_decode][:budget]
    prompts, wanted = rows[~is_decode], remaining[~is_decode]
    before = wanted.cumsum() - wanted
    left = min(budget - len(decodes), chunk) if len(decodes) else budget
    chunks = np.clip(left - before, 0, wanted)
    served = chunks > 0
    return (
        np.concatenate((decodes, prompts[served])),
        np.concatenate((np.ones(len(decodes), np.int64), chunks[served])),
        left - int(chunks.sum()),
    )
