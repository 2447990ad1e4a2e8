"""Keeps the pieces of work that steps are made of, so that each is made, or captured in a graph, only once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, Final

_MAX_PLAIN_WORK: Final = 1024  # kept pieces of each kind: without buckets steps have any size


class KeptWork:
    """Pieces of a step by their arguments, made at first use. Captured pieces are kept for good: to capture one again
    would stop the device in the middle of its steps."""

    def __init__(
        self,
        make: Callable[..., Callable[[], None]],
        capture: Callable[[Callable[[], None]], Callable[[], None]],
        is_captured: Callable[..., bool],
    ) -> None:
        self._captured = cache(lambda *key: capture(make(*key)))
        self._plain = lru_cache(maxsize=_MAX_PLAIN_WORK)(make)
        self._is_captured = is_captured

    def __call__(self, *key: Any) -> Callable[[], None]:
        return (self._captured if self._is_captured(*key) else self._plain)(*key)
