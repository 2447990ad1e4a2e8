"""Writes the events of a streamed response, each as a server-sent event with its sequence number.

The event of one more token is a fixed text around its delta, because a server with many streams spends most of its
time there.

    created, in_progress
    for each item:  output_item.added  content_part.added  deltas  done  content_part.done  output_item.done
    completed | incomplete | failed, error
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import msgspec

from pipeline.http.errors import HttpError, openai_body
from pipeline.http.openai.responses.output_items import Change, Kind, OutputItem

_encode: Final = msgspec.json.Encoder().encode
_DONE: Final = b"data: [DONE]\n\n"
_DELTAS: Final[dict[Kind, str]] = {
    "message": "response.output_text",
    "reasoning": "response.reasoning_text",
    "function_call": "response.function_call_arguments",
}


class EventWriter:
    """The events of one response, in their order."""

    def __init__(self) -> None:
        self._number = 0  # of the next event
        self._before = b""  # the parts of the open item's delta event
        self._between = b""

    def begin(self, response: dict[str, Any]) -> bytes:
        """The events before any item. `response` is in progress."""
        return b"".join(self._event(f"response.{name}", response=response) for name in ("created", "in_progress"))

    def write(self, changes: Iterable[Change]) -> bytes:
        """The events of changes in the output."""
        return b"".join([self._of_change(change) for change in changes])

    def end(self, response: dict[str, Any]) -> bytes:
        """The last event of a response that has ended, named after its status."""
        return self._event(f"response.{response['status']}", response=response) + _DONE

    def fail(self, response: dict[str, Any], error: HttpError) -> bytes:
        """The events of a response that has failed.

        OpenAI's clients raise an exception at an event with `error`, so that one comes last.
        """
        failed = self._event("response.failed", response=response)
        body = openai_body(error)["error"]
        fields = {"code": error.code, "message": error.message, "param": error.param, "error": body}
        return failed + self._event("error", **fields) + _DONE

    def _of_change(self, change: Change) -> bytes:
        item = change.item
        if change.kind == "grown":
            number = self._number
            self._number = number + 1
            logprobs = b'"logprobs":%b,' % _encode(change.logprobs) if change.logprobs else self._between
            return b'%b%d,%b"delta":%b}\n\n' % (self._before, number, logprobs, _encode(change.text))
        return self._begun(item) if change.kind == "begun" else self._ended(item)

    def _begun(self, item: OutputItem) -> bytes:
        self._between = b'"logprobs":[],' if item.kind == "message" else b""
        delta = {"type": f"{_DELTAS[item.kind]}.delta", **_place(item)}
        self._before = b'event: %b\ndata: %b,"sequence_number":' % (delta["type"].encode(), _encode(delta)[:-1])
        events = self._event("response.output_item.added", output_index=item.index, item=item.value())
        if item.kind != "function_call":
            events += self._event("response.content_part.added", **_place(item), part=item.part())
        return events

    def _ended(self, item: OutputItem) -> bytes:
        name, place = f"{_DELTAS[item.kind]}.done", _place(item)
        if item.kind == "function_call":
            events = self._event(name, **place, name=item.name, arguments=item.text)
        else:
            logprobs = {"logprobs": item.logprobs} if item.kind == "message" else {}
            events = self._event(name, **place, text=item.text, **logprobs)
            events += self._event("response.content_part.done", **place, part=item.part())
        return events + self._event("response.output_item.done", output_index=item.index, item=item.value())

    def _event(self, name: str, /, **fields: Any) -> bytes:
        data = _encode({"type": name, "sequence_number": self._number, **fields})
        self._number += 1
        return b"event: %b\ndata: %b\n\n" % (name.encode(), data)


def _place(item: OutputItem) -> dict[str, Any]:
    place: dict[str, Any] = {"item_id": item.id, "output_index": item.index}
    return place if item.kind == "function_call" else place | {"content_index": 0}
