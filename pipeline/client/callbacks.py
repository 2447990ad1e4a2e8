"""Callbacks of an event loop that do not keep their owner alive, and sleeps that can be ended."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable


def weakly(method: Callable[..., None]) -> Callable[..., None]:
    """A callback for the method that does not keep its object alive, and does nothing once the object is gone."""
    reference = weakref.WeakMethod(method)

    def call(*arguments: object) -> None:
        if (found := reference()) is not None:
            found(*arguments)

    return call


class Pauses:
    """The present sleeps of a client's tasks."""

    def __init__(self) -> None:
        self._open: set[asyncio.Future[None]] = set()

    async def sleep(self, seconds: float, loop: asyncio.AbstractEventLoop) -> None:
        """Sleep so long, or until `end()`."""
        pause = loop.create_future()
        self._open.add(pause)
        try:
            async with asyncio.timeout(seconds):
                await pause
        except TimeoutError:
            pass
        finally:
            self._open.discard(pause)

    def end(self) -> None:
        """Wake all tasks that sleep now."""
        for pause in self._open:
            if not pause.done() and not pause.get_loop().is_closed():
                pause.set_result(None)
