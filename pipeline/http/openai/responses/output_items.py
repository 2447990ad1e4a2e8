"""The items of an answer: reasoning, messages and calls. They grow with the events of the sample.

A streamed answer and a whole one are built by the same object; the stream's events are written from its changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple

from pipeline.client.outputs import TokenLogprob
from pipeline.http.generation.events import Content, Event, Reasoning, ToolCallBegin
from pipeline.http.openai.wire import chat_logprobs
from pipeline.http.service import new_id

Kind = Literal["reasoning", "message", "function_call"]
Status = Literal["in_progress", "completed", "incomplete"]
_PREFIXES: Final[dict[Kind, str]] = {"reasoning": "rs", "message": "msg", "function_call": "fc"}


@dataclass(slots=True, kw_only=True)
class OutputItem:
    """One item. `texts` are the pieces of its text, or of its arguments; `logprobs` are a message's alone."""

    index: int
    kind: Kind
    id: str
    status: Status = "in_progress"
    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    name: str = ""
    call_id: str = ""

    @property
    def text(self) -> str:
        """Everything that it has so far."""
        return "".join(self.texts)

    def part(self) -> dict[str, Any]:
        """A message or a reasoning has one part, which holds all of its text."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": self.logprobs}

    def value(self) -> dict[str, Any]:
        """The item as JSON. One that has just begun has no part."""
        head = {"id": self.id, "type": self.kind, "status": self.status}
        parts = [] if self.status == "in_progress" else [self.part()]
        if self.kind == "function_call":
            return {**head, "call_id": self.call_id, "name": self.name, "arguments": self.text}
        if self.kind == "reasoning":
            return {**head, "summary": [], "content": parts}
        return {**head, "role": "assistant", "content": parts}


class Change(NamedTuple):
    """An item has begun, has got more text, or has ended."""

    kind: Literal["begun", "grown", "ended"]
    item: OutputItem
    text: str = ""
    logprobs: Sequence[dict[str, Any]] = ()


class Output:
    """The items of one answer.

    Args:
        response_hex: the response's id without its prefix. The ids of its items begin with it.
    """

    def __init__(self, response_hex: str) -> None:
        self.items: list[OutputItem] = []
        self._hex = response_hex
        self._open: OutputItem | None = None
        self._logprobs: list[TokenLogprob] = []  # of tokens whose text the parser still holds back

    def add(self, events: Sequence[Event], logprobs: Sequence[TokenLogprob] | None) -> list[Change]:
        """More events, and the log-probabilities of the tokens that they came with."""
        changes: list[Change] = []
        if logprobs:
            self._logprobs += logprobs
        for event in events:
            match event:
                case Content(text):
                    item = self._item_of("message", changes)
                    if not item.texts:
                        self._logprobs = _last_of(self._logprobs, text)
                    rows = self._take_logprobs()
                    item.logprobs += rows
                case Reasoning(text):
                    item, rows = self._item_of("reasoning", changes), []
                case ToolCallBegin(name, call_id):
                    self._begin("function_call", changes, name, call_id or new_id("call_"))
                    continue
                case _:
                    item, rows, text = self._item_of("function_call", changes), [], event.text
            item.texts.append(text)
            changes.append(Change("grown", item, text, rows))
        if events:  # the others belong to tokens of the reasoning or of calls
            self._logprobs.clear()
        return changes

    def finish(self, status: Literal["completed", "incomplete"]) -> list[Change]:
        """The sample has ended. An answer without any text is an empty message."""
        changes: list[Change] = []
        if not self.items:
            self._begin("message", changes)
        if self._open is not None and self._open.kind == "message":
            self._open.logprobs += self._take_logprobs()
        self._end(changes, status)
        return changes

    def value(self) -> list[dict[str, Any]]:
        """The items as JSON."""
        return [item.value() for item in self.items]

    def _item_of(self, kind: Kind, changes: list[Change]) -> OutputItem:
        if self._open is None or self._open.kind != kind:
            return self._begin(kind, changes)
        return self._open

    def _begin(self, kind: Kind, changes: list[Change], name: str = "", call_id: str = "") -> OutputItem:
        self._end(changes, "completed")
        index = len(self.items)
        item = OutputItem(
            index=index, kind=kind, id=f"{_PREFIXES[kind]}_{self._hex}{index}", name=name, call_id=call_id
        )
        self.items.append(item)
        self._open = item
        changes.append(Change("begun", item))
        return item

    def _end(self, changes: list[Change], status: Literal["completed", "incomplete"]) -> None:
        if self._open is not None:
            self._open.status = status
            changes.append(Change("ended", self._open))
            self._open = None

    def _take_logprobs(self) -> list[dict[str, Any]]:
        if not self._logprobs:
            return []
        rows: list[dict[str, Any]] = chat_logprobs(self._logprobs)["content"]
        self._logprobs.clear()
        return rows


def _last_of(logprobs: list[TokenLogprob], text: str) -> list[TokenLogprob]:
    """The last tokens, those that a text came with. Tokens before them belong to the tag that ends the reasoning."""
    num_bytes, begin = len(text.encode()), len(logprobs)
    while begin and num_bytes > 0:
        begin -= 1
        num_bytes -= len(logprobs[begin].bytes)
    return logprobs[begin:]
