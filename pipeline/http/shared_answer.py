"""One answer of the engine for all requests that ask for it within a moment.

Endpoints that need no key could otherwise make the engine work as often as anyone likes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class SharedAnswer(Generic[T]):
    """Asks at most once in `max_age_s` seconds. Belongs to one event loop.

    Requests that arrive while an answer is under way wait for it together. If one of them is cancelled, the others
    still get it. An error goes to all that wait for it, and the next request asks again.
    """

    def __init__(self, ask: Callable[[], Awaitable[T]], max_age_s: float) -> None:
        self._ask = ask
        self._max_age_s = max_age_s
        self._answer: asyncio.Future[T] | None = None
        self._asked_at = 0.0

    async def get(self) -> T:
        """The latest answer, at most `max_age_s` old. Raises what asking raises."""
        answer = self._answer
        if answer is None or self._is_stale(answer):
            answer = self._answer = asyncio.ensure_future(self._ask())
            answer.add_done_callback(_read_error)
            self._asked_at = time.monotonic()
        return await asyncio.shield(answer)

    def _is_stale(self, answer: asyncio.Future[T]) -> bool:
        if not answer.done():
            return False
        return (
            answer.cancelled() or answer.exception() is not None or time.monotonic() - self._asked_at >= self._max_age_s
        )


def _read_error(answer: asyncio.Future[T]) -> None:
    """Keep asyncio from logging an error that no request is left to receive."""
    if not answer.cancelled():
        answer.exception()
