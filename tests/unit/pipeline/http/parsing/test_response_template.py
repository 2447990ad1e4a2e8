"""A model's own response template is read as transformers reads it, while the text arrives."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers.utils.chat_parsing import parse_response

from pipeline.http.generation.events import Content, Event, Reasoning, ToolArguments, ToolCallBegin
from pipeline.http.parsing.formats import OutputFormat
from pipeline.http.parsing.response_template import template_tags
from tests.unit.pipeline.http.parsing.reading import arguments, merged

ACTIONS = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "thinking": {"open": "<|START_THINKING|>", "close": "<|END_THINKING|>", "content": "text"},
        "content": {"open": "<|START_RESPONSE|>", "close": "<|END_RESPONSE|>", "content": "text"},
        "tool_calls": {
            "open": "<|START_ACTION|>",
            "close": "<|END_ACTION|>",
            "content": "json",
            "transform_each": True,
            "transform": {"type": "function", "function": {"name": "{tool_name}", "arguments": "{parameters}"}},
        },
    },
}

TAGGED = {  # patterns with groups, arguments between tags, content without borders
    "start_anchor": "<|assistant|>",
    "defaults": {"role": "assistant", "tool_calls": []},
    "fields": {
        "reasoning": {"open_pattern": r"<think>\s*", "close_pattern": r"\s*</think>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"<call>\s*<function=(?P<name>\w+)>",
            "close": "</call>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {
                "tag_pattern": r"<parameter=(?P<key>\w+)>(?P<value>.*?)</parameter>",
                "value_parser": {"name": "json", "args": {"allow_non_json": True}},
            },
            "transform": {"function": {"name": "{name}", "arguments": "{content}"}},
        },
        "notes": {"open": "<notes>", "close": "</notes>", "content": "json", "optional": False},
        "content": {"content": "text"},
    },
}
TOOL = {"name": "f", "parameters": {"properties": {"n": {"type": "integer"}}}}


def events_of(
    template: dict[str, Any], text: str, *, cut: bool, form: str = "native", inside: bool = False
) -> list[Event]:
    chosen = OutputFormat(
        "response_template",
        "response_template",
        reasoning_tags=template_tags(template),
        response_template=template,
    )
    reader = chosen.parser(reads_calls=form, tools=[TOOL], starts_in_reasoning=inside)  # type: ignore[arg-type]
    events = [event for piece in (text if cut else [text]) for event in reader.push(piece)]
    return merged([*events, *reader.finish()])


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (
            ACTIONS,
            '<|START_THINKING|>I see<|END_THINKING|><|START_ACTION|>[{"tool_name": "f", "parameters": {"n": 1, '
            '"s": "北 }"}}, {"tool_name": "g", "parameters": {}}]<|END_ACTION|><|START_RESPONSE|>Hi<|END_RESPONSE|>',
        ),
        (
            TAGGED,
            "<think>\nI <b> see\n</think>Let me<call><function=f><parameter=n>1</parameter><parameter=s>a 🌧"
            "</parameter></call><call>\n<function=g></call>",
        ),
    ],
    ids=["actions", "tagged"],
)
def test_a_response_template_gives_what_transformers_reads(template: dict[str, Any], text: str) -> None:
    fields = {name: field | {"optional": True} for name, field in template["fields"].items()}
    message = parse_response(text, template | {"fields": fields}, prefix="", tools=[TOOL])

    events = events_of(template, text, cut=False)

    assert events_of(template, text, cut=True) == events
    reasoning = next(event.text for event in events if isinstance(event, Reasoning))
    assert reasoning.strip() == message.get("thinking", message.get("reasoning"))
    assert next(event.text for event in events if isinstance(event, Content)) == message["content"]
    calls = [call["function"] for call in message["tool_calls"]]
    assert [event.name for event in events if isinstance(event, ToolCallBegin)] == [call["name"] for call in calls]
    assert arguments(events) == [call["arguments"] for call in calls]


def test_thinking_and_content_stream_as_they_arrive() -> None:
    chosen = OutputFormat("response_template", "response_template", response_template=ACTIONS)
    reader = chosen.parser(reads_calls="native", tools=[], starts_in_reasoning=False)
    assert reader.push("<|START_THINKING|>I") == [Reasoning("I")]
    assert reader.push(" see<|END_") == [Reasoning(" see")]
    assert reader.push("THINKING|><|START_RESPONSE|>Hi") == [Content("Hi")]


def test_a_prompt_that_has_opened_the_thinking_is_told_to_transformers() -> None:
    text = "I see<|END_THINKING|><|START_RESPONSE|>Hi"
    assert events_of(ACTIONS, text, cut=True, inside=True) == [Reasoning("I see"), Content("Hi")]


def test_arguments_that_are_texts_get_the_type_of_the_tool_s_schema() -> None:
    call = json.dumps([{"tool_name": "f", "parameters": {"n": "1", "s": "2"}}])
    events = events_of(ACTIONS, f"<|START_ACTION|>{call}<|END_ACTION|>", cut=False)
    assert events == [ToolCallBegin("f"), ToolArguments('{"n": 1, "s": "2"}')]


@pytest.mark.parametrize(
    ("template", "text", "content"),
    [
        (ACTIONS, "<|START_ACTION|>[{oops<|END_ACTION|>", "[{oops"),
        (ACTIONS, '<|START_ACTION|>[{"a": 1}]<|END_ACTION|>', '[{"a": 1}]'),
        (TAGGED, "<notes>{oops</notes>So", "So"),
    ],
)
def test_a_broken_field_fails_no_request_and_a_broken_call_is_content(
    template: dict[str, Any], text: str, content: str
) -> None:
    assert events_of(template, text, cut=True) == [Content(content)]


def test_calls_that_are_not_asked_for_are_content() -> None:
    assert events_of(ACTIONS, "<|START_ACTION|>[]<|END_ACTION|>", cut=False, form="none") == [Content("[]")]


def test_the_json_of_a_grammar_is_read_behind_the_thinking() -> None:
    text = '<|START_THINKING|>I see<|END_THINKING|>[{"name": "f", "parameters": {"n": 1}}]'
    events = events_of(ACTIONS, text, cut=True, form="json_list")
    assert events == [Reasoning("I see"), ToolCallBegin("f"), ToolArguments('{"n": 1}')]
