"""Callbacks of an event loop that do not keep their owner alive, and the end of a sleep."""

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


def wake(sleeper: asyncio.Future[None]) -> None:
    if not sleeper.done() and not sleeper.get_loop().is_closed():
        sleeper.set_result(None)
