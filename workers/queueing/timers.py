"""The deadlines and queue time-outs of requests. Reads no clock and ends no request.

The gateway and the scheduler each keep timers for the same request. Both count from its arrival at the gateway.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Final, Literal

TimeoutReason = Literal["deadline", "queue_timeout"]

_FEW: Final = 64


class Timers:
    """Timers by key. A timer of an ended request stays until it is due, or until a clean-up removes all such timers.

    Args:
        is_open: whether the request of a key has not ended.
    """

    def __init__(self, is_open: Callable[[int], bool]) -> None:
        self._is_open = is_open
        self._heap: list[tuple[int, int, TimeoutReason]] = []
        self._max_kept = _FEW

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def first_ns(self) -> int | None:
        """When the next timer is due. Its request may have ended."""
        return self._heap[0][0] if self._heap else None

    def add(self, at_ns: int, key: int, reason: TimeoutReason) -> None:
        """Set a timer for a time in nanoseconds, on the clock that `take_due` is given."""
        if len(self._heap) >= self._max_kept:
            self._heap = [entry for entry in self._heap if self._is_open(entry[1])]
            heapq.heapify(self._heap)
            self._max_kept = max(_FEW, 2 * len(self._heap))  # so a clean-up costs constant time per added timer
        heapq.heappush(self._heap, (at_ns, key, reason))

    def clear(self) -> None:
        self._heap.clear()

    def take_due(self, now_ns: int) -> list[tuple[int, TimeoutReason]]:
        """Remove the due timers: keys and reasons, in order. A key may occur twice, and its request may have ended."""
        due = []
        while self._heap and self._heap[0][0] <= now_ns:
            _, key, reason = heapq.heappop(self._heap)
            due.append((key, reason))
        return due
