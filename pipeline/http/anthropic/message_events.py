"""Writes the parts of an answer as the events of a stream of Anthropic's API.

message_start, ping, then for each block content_block_start, its deltas and content_block_stop; message_delta,
message_stop. Only the text of a delta is encoded for each token; the rest of the event is made once for each block.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import msgspec

from pipeline.http.anthropic.answer import (
    ending,
    message_value,
    new_call_id,
    new_signature,
    prompt_usage,
    tool_use_value,
    usage_value,
)
from pipeline.http.generation.chat_run import Part
from pipeline.http.generation.events import Content, Event, Reasoning, ToolArguments, ToolCallBegin

_encode: Final = msgspec.json.Encoder().encode
_PING: Final = b'event: ping\ndata: {"type":"ping"}\n\n'
_STOP: Final = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
_NOT_ENDED: Final = {"stop_reason": None, "stop_sequence": None}
_DELTAS: Final = {  # of each type of block: the type of its deltas, and the key of their text
    "text": ("text_delta", "text"),
    "thinking": ("thinking_delta", "thinking"),
    "tool_use": ("input_json_delta", "partial_json"),
}


class EventWriter:
    """The events of one message. `shows_thinking` False: blocks of thinking have no text."""

    def __init__(self, message_id: str, model: str, *, shows_thinking: bool) -> None:
        self._message_id = message_id
        self._model = model
        self._shows_thinking = shows_thinking
        self._index = -1  # of the newest block
        self._open = ""  # type of the block that is open; "" = none is
        self._delta_begin = b""
        self._has_calls = False

    def _start(self, usage: dict[str, Any]) -> bytes:
        """The events before the first block."""
        message = message_value(self._message_id, self._model, [], _NOT_ENDED, usage)
        return _event("message_start", {"message": message}) + _PING

    def write(self, part: Part) -> bytes:
        """The events of a part; b"" if it has none. The part with the usage ends the message."""
        events = b"".join(self._events(part.events))
        if part.prompt_usage is not None:
            events = self._start(prompt_usage(part.prompt_usage)) + events
        if part.usage is None:
            return events
        assert part.finish_reason is not None, "a message has one sample, so its last part ends it"
        end = ending(part.finish_reason, part.stop_reason, has_calls=self._has_calls)
        last = {"delta": end, "usage": usage_value(part.usage)}
        return events + b"".join(self._close()) + _event("message_delta", last) + _STOP

    def _events(self, events: Iterable[Event]) -> Iterable[bytes]:
        for event in events:
            match event:
                case Content(text):
                    yield from self._text("text", text, {"type": "text", "text": ""})
                case Reasoning(text):
                    block = {"type": "thinking", "thinking": "", "signature": ""}
                    yield from self._text("thinking", text if self._shows_thinking else "", block)
                case ToolCallBegin(name, call_id):
                    self._has_calls = True
                    call = tool_use_value(call_id or new_call_id(), name, {})
                    yield from self._begin("tool_use", call)
                case ToolArguments(text):
                    yield self._delta(text)

    def _text(self, kind: str, text: str, block: dict[str, Any]) -> Iterable[bytes]:
        if self._open != kind:
            yield from self._begin(kind, block)
        if text:
            yield self._delta(text)

    def _begin(self, kind: str, block: dict[str, Any]) -> Iterable[bytes]:
        yield from self._close()
        self._index += 1
        self._open = kind
        delta, key = _DELTAS[kind]
        self._delta_begin = (
            f'event: content_block_delta\ndata: {{"type":"content_block_delta","index":{self._index},'
            f'"delta":{{"type":"{delta}","{key}":'
        ).encode()
        yield _event("content_block_start", {"index": self._index, "content_block": block})

    def _delta(self, text: str) -> bytes:
        return self._delta_begin + _encode(text) + b"}}\n\n"

    def _close(self) -> Iterable[bytes]:
        if not self._open:
            return
        if self._open == "thinking":
            delta = {"type": "signature_delta", "signature": new_signature()}
            yield _event("content_block_delta", {"index": self._index, "delta": delta})
        yield _event("content_block_stop", {"index": self._index})
        self._open = ""


def _event(kind: str, fields: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), _encode({"type": kind, **fields}))
