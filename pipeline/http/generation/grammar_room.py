"""Bounds the size of a grammar of calls while it is built."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from ipc.errors import InvalidRequest
from ipc.structured_outputs import MAX_STRUCTURE_BYTES

NODE_BYTES: Final = 4  # a value or an element takes at least this much of the grammar's text
_DEFINITIONS: Final = ("$defs", "definitions")


class GrammarRoom:
    """The bytes that the grammar of a request may still take. References of a schema can make it grow exponentially.

    The builders count less than the text will have, so no grammar is refused that would be small enough.
    """

    def __init__(self) -> None:
        self._left = MAX_STRUCTURE_BYTES
        self._name = ""

    def enter(self, name: str) -> None:
        """What follows is built for this function."""
        self._name = name

    def take(self, num_bytes: int = NODE_BYTES) -> None:
        """Raises InvalidRequest, naming the function, if the grammar becomes too large."""
        self._left -= num_bytes
        if self._left < 0:
            raise InvalidRequest(
                f"tools: the parameters of {self._name!r} need a grammar of more than {MAX_STRUCTURE_BYTES:,} bytes "
                "with those of the tools before it: simplify them, or give fewer tools"
            )


class RootSchema:
    """A whole schema of parameters, and the room for what is built from it."""

    def __init__(self, schema: dict[str, Any], room: GrammarRoom) -> None:
        self.schema: Final = schema
        self.room: Final = room
        self._definitions: Final[dict[str, Any]] = {key: schema[key] for key in _DEFINITIONS if key in schema}
        self._definitions_bytes = -1

    def with_definitions(self, part: dict[str, Any]) -> dict[str, Any]:
        """A part of the schema that can stand alone. Each such copy takes room for the definitions."""
        if self._definitions and self._definitions_bytes < 0:
            self._definitions_bytes = len(msgspec.json.encode(self._definitions))
        self.room.take(max(0, self._definitions_bytes))
        return {**self._definitions, **part}
