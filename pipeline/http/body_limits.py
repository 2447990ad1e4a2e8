"""Bounds the number of JSON values in a body before it is decoded.

The bound on bytes does not bound the time: 16 MiB of text are decoded in 5 ms, 16 MiB of empty lists in a second. The
process serves nobody else in that time, because no decoder of JSON releases the GIL. Counting is quick: it searches for
a few characters, in pieces, and other requests go on between the pieces.
"""

from __future__ import annotations

import asyncio
from typing import Final

from pipeline.http.config import HttpConfig
from pipeline.http.errors import HttpError

PIECE_BYTES: Final = 1 << 20  # take at most about 5 ms
_SMALLEST_BYTES: Final = 2  # of a value and the comma behind it; a text, a list or an object has two bytes itself


async def check_num_values(body: bytes, config: HttpConfig, turn: asyncio.Lock) -> None:
    """Raises HttpError 413 for JSON with more values, or more texts, lists and objects, than the server allows.

    Counts any bytes, valid JSON or not. `turn`: one for all large bodies of the process. Each waits for it, so between
    two bodies that are decoded, the event loop serves everybody else.
    """
    if len(body) > _SMALLEST_BYTES * min(config.max_body_values, config.max_body_objects):
        async with turn:
            await _count(body, config)


async def _count(body: bytes, config: HttpConfig) -> None:
    counter, at = _Counter(), 0
    while at < len(body):
        piece = body[at : at + PIECE_BYTES]
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2:
            piece = body[at : at + PIECE_BYTES + 1]  # it would end within an escape sequence
        at += len(piece)
        counter.count(piece, config.max_body_objects)
        if counter.num_objects > config.max_body_objects:
            raise _too_many(config.max_body_objects, "texts, lists and objects", "max_body_objects")
        if counter.num_values > config.max_body_values:
            raise _too_many(config.max_body_values, "values", "max_body_values")
        await asyncio.sleep(0)


class _Counter:
    """Counts what the pieces of one body hold. The names in an object are texts too."""

    def __init__(self) -> None:
        self.num_objects = 0
        self.num_values = 0
        self._is_in_text = False

    def count(self, piece: bytes, max_objects: int) -> None:
        """Add a piece. It must not begin or end within an escape sequence. Stops early beyond `max_objects`."""
        if b"\\" in piece:
            piece = piece.replace(rb"\\", b"").replace(rb"\"", b"")
        num_quotes = piece.count(b'"')
        self.num_objects += (num_quotes + (not self._is_in_text)) // 2  # the texts that begin here
        if self.num_objects > max_objects:
            return
        outside = b"".join(piece.split(b'"')[self._is_in_text :: 2])
        self._is_in_text ^= bool(num_quotes % 2)
        num_containers = outside.count(b"[") + outside.count(b"{")
        self.num_objects += num_containers
        self.num_values += num_containers + outside.count(b",")


def _too_many(limit: int, what: str, key: str) -> HttpError:
    return HttpError(413, f"the body has more than {limit:,} {what}: send less, or raise http.{key} of the server")
