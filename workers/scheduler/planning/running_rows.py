"""The rows that run, in order of admission."""

from __future__ import annotations

from typing import Final

import numpy as np

from workers.scheduler.array_types import IntArray

NO_ROWS: Final[IntArray] = np.empty(0, np.int64)


class RunningRows:
    """Stopping a row is one store. The order is compacted once, when it is next asked for."""

    def __init__(self, num_rows: int) -> None:
        self._runs = np.zeros(num_rows, bool)  # [num_rows]
        self._order = NO_ROWS  # replaced and never changed in place: steps in flight keep it
        self._has_stopped = False  # some row in `_order` does not run any more
        self._num = 0

    def __len__(self) -> int:
        return self._num

    def __contains__(self, row: int) -> bool:
        return bool(self._runs[row])

    def rows(self) -> IntArray:
        """All of them, [num_running] int64, oldest first. Callers must not change the array.

        Returns the same array object until a row starts or stops.
        """
        if self._has_stopped:
            self._order = self._order[self._runs[self._order]]
            self._has_stopped = False
        return self._order

    def start(self, rows: list[int]) -> None:
        """Append rows behind all running rows."""
        self._order = np.append(self.rows(), np.array(rows, np.int64))
        self._runs[rows] = True
        self._num += len(rows)

    def stop_all(self) -> None:
        self.stop(self.rows().tolist())

    def stop(self, rows: list[int]) -> None:
        self._runs[rows] = False
        self._has_stopped = True
        self._num -= len(rows)
