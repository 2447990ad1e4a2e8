"""Estimates when a client refused by a full queue should try again, from the rate at which the queue drains."""

from __future__ import annotations

from collections import deque
from typing import Final

MIN_RETRY_S: Final = 0.1
MAX_RETRY_S: Final = 60.0
UNKNOWN_RETRY_S: Final = 1.0  # before anything has left the queue
NUM_RECENT: Final = 64  # number of departures that the rate is measured over


class DrainRate:
    """The rate of the last departures, in requests or another unit. Times are in nanoseconds.

    Time in which the queue is empty does not count, because it says nothing about the rate.
    """

    def __init__(self) -> None:
        self._departures: deque[tuple[int, int]] = deque(maxlen=NUM_RECENT)  # (when, amount)
        self._idle_ns = 0  # time that does not count

    def begin(self, now_ns: int) -> None:
        """The first arrival at an empty queue."""
        if self._departures:
            self._idle_ns = now_ns - self._departures[-1][0]

    def leave(self, now_ns: int, amount: int = 1) -> None:
        """`amount` has left the queue to be served."""
        self._departures.append((now_ns - self._idle_ns, amount))

    def retry_after_s(self, amount: int, now_ns: int) -> float:
        """How long `amount` takes to leave at the recent rate, within [MIN_RETRY_S, MAX_RETRY_S]."""
        if not self._departures:
            return UNKNOWN_RETRY_S
        elapsed_s = (now_ns - self._idle_ns - self._departures[0][0]) / 1e9
        gone = sum(amount for _, amount in self._departures)
        return round(min(MAX_RETRY_S, max(MIN_RETRY_S, amount * elapsed_s / gone)), 1)
