"""Reads a text with a parser, cut in different ways."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from pipeline.http.generation.events import Content, Event, Reasoning, ToolArguments, ToolCallBegin
from pipeline.http.parsing.families import ALWAYS_REASON, HARMONY, REASONING_TAGS
from pipeline.http.parsing.formats import CallForm, OutputFormat
from pipeline.http.parsing.harmony import TAGS

WEATHER = {
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "exact": {"type": "boolean"},
            "places": {"type": "array"},
            "unit": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "range": {"$ref": "#/$defs/Range"},
        },
        "$defs": {"Range": {"anyOf": [{"type": "object"}, {"$ref": "#/$defs/Range"}]}},
    },
}
CLOCK = {"name": "now", "parameters": {"type": "object", "properties": {}}}
TOOLS = [WEATHER, CLOCK]


class Case(NamedTuple):
    """A text of a family and the events it stands for."""

    family: str | None
    text: str
    events: list[Event]
    reasoning: str | None = None
    starts_in_reasoning: bool = False
    form: CallForm = "native"
    tools: Sequence[dict[str, Any]] = TOOLS


def call(name: str, arguments: str, call_id: str | None = None) -> list[Event]:
    """The events of one call."""
    return [ToolCallBegin(name, call_id), ToolArguments(arguments)]


def output_format(case: Case) -> OutputFormat:
    tags = TAGS if case.family == HARMONY else REASONING_TAGS.get(case.reasoning or "")
    assert tags is not None or case.reasoning is None
    assert HARMONY in ALWAYS_REASON
    return OutputFormat(tool_parser=case.family, reasoning_parser=case.reasoning, reasoning_tags=tags)


def merged(events: Iterable[Event]) -> list[Event]:
    """The events with the texts that follow each other joined."""
    whole: list[Event] = []
    for event in events:
        last = whole[-1] if whole else None
        if isinstance(event, Content | Reasoning | ToolArguments) and isinstance(last, type(event)):
            whole[-1] = type(event)(last.text + event.text)
        else:
            whole.append(event)
    return whole


def without_drawn_id(event: Event, text: str) -> Event:
    """The event. An id that is not in the text is left out."""
    return (
        event._replace(call_id=None)
        if isinstance(event, ToolCallBegin) and event.call_id and event.call_id not in text
        else event
    )


def events_of(case: Case, pieces: Iterable[str]) -> list[Event]:
    parser = output_format(case).parser(
        reads_calls=case.form, tools=case.tools, starts_in_reasoning=case.starts_in_reasoning
    )
    events = [event for piece in pieces for event in parser.push(piece)]
    assert all(not isinstance(event, Content | Reasoning | ToolArguments) or event.text for event in events)
    return merged(without_drawn_id(event, case.text) for event in [*events, *parser.finish()])


def arguments(events: Iterable[Event]) -> list[Any]:
    """The values of the calls' arguments, which must be JSON."""
    texts: list[str] = []
    for event in events:
        if isinstance(event, ToolCallBegin):
            texts.append("")
        elif isinstance(event, ToolArguments):
            texts[-1] += event.text
    return [json.loads(text) for text in texts]
