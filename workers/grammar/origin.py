"""Names the field of a request that a grammar came from, for errors. A structural tag may say it itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from ipc.structured_outputs import StructuredOutputs

SOURCE: Final = "source"  # the key of a structural tag, or of a format in it, that names the field it was made from
_MAX_SOURCE_CHARS: Final = 300
_POSITION: Final = re.compile(r"at (\d+)\(\d+\): ")  # line and column in the Lark text


class _Tag(msgspec.Struct):
    source: Any = None


@dataclass(frozen=True)
class Origin:
    """The fields of a request that a grammar came from.

    Args:
        whole: the field of the whole grammar.
        lines: fields of single lines of its Lark text; the first line has the number 1.
    """

    whole: str
    lines: Mapping[int, str] = field(default_factory=dict)

    def of(self, problem: str) -> str:
        """The field that llguidance's error is about."""
        found = _POSITION.match(problem)
        return self.whole if found is None else self.lines.get(int(found[1]), self.whole)


def source_of(node: Mapping[str, Any]) -> str | None:
    """The field that a format names as its source."""
    source = node.get(SOURCE)
    return source[:_MAX_SOURCE_CHARS] if isinstance(source, str) and source else None


def field_of(spec: StructuredOutputs) -> str:
    """The field of the whole constraint. Parses a structural tag, so it is for errors only."""
    if spec.structural_tag is not None:
        try:
            tag = msgspec.json.decode(spec.structural_tag.encode("utf-8", "replace"), type=_Tag)
        except (msgspec.DecodeError, RecursionError):
            pass
        else:
            if source := source_of({SOURCE: tag.source}):
                return source
    return f"structured_outputs.{spec.constraint}"
