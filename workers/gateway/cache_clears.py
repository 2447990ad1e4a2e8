"""Keeps the ClearCache queries that the scheduler has not answered, each with its client."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Final

from ipc.errors import QueueFull
from workers.queueing.drain_rate import DrainRate

MAX_CLEARING: Final = 64  # ClearCache messages of one client that the scheduler has not answered


class CacheClears:
    """Open ClearCache queries. The gateway renumbers them, because two clients may use the same query id."""

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self._asked: dict[int, tuple[bytes, int]] = {}  # clients and their query ids, by the gateway's id
        self._num_asked: Counter[bytes] = Counter()  # by client
        self._departures = DrainRate()

    def add(self, identity: bytes, query_id: int, now_ns: int) -> int:
        """Register a client's query. Returns the gateway's id. Raises QueueFull if the client has too many open."""
        if self._num_asked[identity] >= MAX_CLEARING:
            retry_s = self._departures.retry_after_s(1, now_ns)
            raise QueueFull(
                f"{MAX_CLEARING} ClearCache messages of this client are still unanswered: wait for an answer, or try "
                f"again in {retry_s:g} s",
                retry_s,
            )
        if not self._asked:
            self._departures.begin(now_ns)
        clear_id = next(self._ids)
        self._asked[clear_id] = identity, query_id
        self._num_asked[identity] += 1
        return clear_id

    def done(self, clear_id: int, now_ns: int) -> tuple[bytes, int]:
        """The scheduler has emptied its cache. Returns the client that asked, and its query id."""
        self._departures.leave(now_ns)
        identity, query_id = self._asked.pop(clear_id)
        self._num_asked[identity] -= 1
        if not self._num_asked[identity]:
            del self._num_asked[identity]
        return identity, query_id

    def take_all(self) -> list[tuple[bytes, int]]:
        """All open queries, each with its client: the cache that they were to empty is gone."""
        asked = list(self._asked.values())
        self._asked.clear()
        self._num_asked.clear()
        return asked
