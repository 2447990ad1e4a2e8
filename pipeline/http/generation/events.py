"""The events that one sample's text consists of. Parsers make them, and each API renders them in its own form."""

from __future__ import annotations

from typing import NamedTuple


class Reasoning(NamedTuple):
    """More text of the model's reasoning."""

    text: str


class Content(NamedTuple):
    """More text of the answer."""

    text: str


class ToolCallBegin(NamedTuple):
    """A call of a tool begins. `call_id` is the model's own id; None: the API draws one."""

    name: str
    call_id: str | None = None


class ToolArguments(NamedTuple):
    """More of the JSON text of the arguments of the call that began last."""

    text: str


Event = Reasoning | Content | ToolCallBegin | ToolArguments
