"""What a client keeps to ask again: how long an interrupted question has waited, and an open query with its frame.

A question is a request (`open_request.py`) or a query. Knows no sockets and no timers. Times are of time.monotonic().
"""

from __future__ import annotations

import asyncio
import math
from typing import Any

from ipc.errors import RingfeedError
from pipeline.client.backoff import FIRST_PAUSE_S, LONGEST_PAUSE_S, jittered


class Interruption:
    """The wait of a question for an engine that continues it, over all attempts since its last news.

    Time that an engine works on the question does not count.
    """

    __slots__ = ("_num_attempts", "_since", "_waited_s", "cause", "retry_at")

    def __init__(self) -> None:
        self.cause: RingfeedError | None = None
        self.retry_at = 0.0  # it may be sent again from then on
        self._num_attempts = 0
        self._waited_s = 0.0  # before the last attempt
        self._since = 0.0  # of the present wait

    def begin(self, cause: RingfeedError, now: float) -> None:
        """The question waits: it was interrupted, or an engine has refused the last attempt."""
        self.cause, self._since = cause, now
        pause_s = cause.retry_after_s
        if not pause_s and self._num_attempts:
            pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (self._num_attempts - 1))
        self.retry_at = now + jittered(pause_s)

    def sent(self, now: float) -> None:
        """The question was sent again."""
        self._num_attempts += 1
        self._waited_s += now - self._since

    def ends_at(self, limit_s: float | None) -> float:
        """When the present wait has to end, so that all of them together take `limit_s` seconds; None = never."""
        return math.inf if limit_s is None else self._since + limit_s - self._waited_s


class OpenQuery:
    """A query without an answer, and the frame that asks it. Queries may be asked twice: none of them adds anything.

    Args:
        query_id: of the message; the request id of a query that has one.
        answer: gets the engine's answer, or its error.
        frame: the encoded message.
        is_queued: whether it waits for a tokenizer. Only an engine that is ready or recovering takes it then.
    """

    __slots__ = ("answer", "frame", "interruption", "key", "needs_ready")

    def __init__(self, query_id: int | str, answer: asyncio.Future[Any], frame: bytes, *, is_queued: bool) -> None:
        self.key = query_id
        self.answer = answer
        self.frame = frame
        self.needs_ready = is_queued
        self.interruption: Interruption | None = None  # None: it was not interrupted

    def sent_again(self) -> None:
        """It was sent again."""

    def frame_again(self, now: float) -> bytes:
        """The frame for another engine."""
        return self.frame

    def fail(self, error: RingfeedError) -> None:
        if not self.answer.done() and not self.answer.get_loop().is_closed():
            self.answer.set_exception(error)
