"""Reads the text of a model as the `response_template` of its tokenizer_config.json says, with transformers' parser.

Source: transformers' `utils/chat_parsing`. The template names fields and the texts or patterns around each. The
parser streams thinking and content as they arrive. It holds a call back until the call's field has ended: a template
may rebuild calls from any text, so their arguments cannot be read before. The first use imports transformers, which
does not load torch then.

The older `response_schema`, which transformers no longer reads, is not read here either.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pipeline.http.generation.events import Event
from pipeline.http.parsing.scanner import Output, Tool
from pipeline.http.parsing.xml_families import typed_arguments

logger = logging.getLogger(__name__)

_REASONING: Final = ("thinking", "reasoning", "reasoning_content")
_CALLS: Final = "tool_calls"
_BORDERS: Final = ("open", "open_pattern", "close", "close_pattern")
_PLACEHOLDER: Final = re.compile(r"\{(\w+)[\w.]*\}")


def template_tags(template: Mapping[str, Any]) -> tuple[str, str] | None:
    """The texts around the thinking, if the template gives them as texts."""
    fields = template.get("fields")
    for name in _REASONING:
        field = fields.get(name) if isinstance(fields, dict) else None
        if isinstance(field, dict):
            begin, end = (_first_text(field.get(key)) for key in ("open", "close"))
            return (begin, end) if begin and end else None
    return None


def _first_text(anchor: Any) -> str | None:
    """An anchor is a text, or a list of texts that mean the same."""
    anchor = anchor[0] if isinstance(anchor, list) and anchor else anchor
    return anchor if isinstance(anchor, str) else None


def check_template(template: Any) -> None:
    """Raise ValueError if transformers cannot read the template."""
    try:
        from transformers.utils.chat_parsing.response_templates import load_response_template
    except ImportError as error:
        raise ValueError(f"the installed transformers reads no response templates: {error}") from None

    load_response_template(template)


class TemplateParser:
    """Reads one sample. An OutputParser.

    `reads_calls` False: the text of a call is content. `begin_of_reasoning`: the text that the prompt ends with, if it
    has opened the reasoning.
    """

    def __init__(
        self, template: dict[str, Any], tools: Sequence[Tool], *, reads_calls: bool, begin_of_reasoning: str = ""
    ) -> None:
        from transformers.utils.chat_parsing import ResponseParser
        from transformers.utils.chat_parsing.response_templates import load_response_template

        self._calls = load_response_template(template).fields.get(_CALLS)
        self._tools = {str(tool.get("name")): tool for tool in tools}
        self._reads_calls = reads_calls
        self._out = Output()
        self._parser = ResponseParser(_with_raw_fields(template), prefix=begin_of_reasoning)
        self._convert(self._parser.initial_events)

    def push(self, text: str) -> list[Event]:
        self._convert(self._parser.feed(text))
        return self._out.take()

    def finish(self) -> list[Event]:
        self._convert(self._parser.finalize()[1])
        self._out.finish()
        return self._out.take()

    def _convert(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            kind, field = event["type"], event["field"]
            if kind == "region_chunk" and field in _REASONING:
                self._out.reasoning(event["text"])
            elif kind == "region_chunk" and field == "content":
                self._out.content(event["text"])
            elif kind == "region_close" and field == _CALLS:
                self._end_calls(event["value"])

    def _end_calls(self, raw: dict[str, str]) -> None:
        """A field of calls has ended. `raw`: its text as "content", and the named groups of its pattern."""
        from transformers.utils.chat_parsing.content_parsers import process_field

        text = raw.pop("content")
        try:
            if not self._reads_calls:
                raise ValueError("calls are not read")
            value = process_field(text, self._calls, raw)
            calls = [call["function"] for call in (value if isinstance(value, list) else [value])]
            named = [(str(call["name"]), call.get("arguments") or {}) for call in calls]
        except (ValueError, TypeError, KeyError, AttributeError):
            self._out.content(text)
            return
        for name, arguments in named:
            self._out.begin_call(name)
            if isinstance(arguments, dict):
                arguments = json.dumps(typed_arguments(self._tools.get(name), arguments), ensure_ascii=False)
            self._out.arguments(arguments if isinstance(arguments, str) else json.dumps(arguments))


def _with_raw_fields(template: dict[str, Any]) -> dict[str, Any]:
    """The template with every field as raw text: a broken field then raises nothing in the middle of the stream."""
    fields = {name: _raw(field, name == _CALLS) for name, field in template["fields"].items()}
    return template | {"defaults": {}, "fields": fields}


def _raw(field: dict[str, Any], keeps_groups: bool) -> dict[str, Any]:
    """A field with the same borders, whose value holds its text and the groups that its transform uses."""
    names = re.findall(r"\(\?P<(\w+)>", f"{field.get('open_pattern', '')}{field.get('close_pattern', '')}")
    used = _PLACEHOLDER.findall(json.dumps(field.get("transform", ""))) if keeps_groups else []
    return {key: field[key] for key in _BORDERS if key in field} | {
        "content_args": {"strip": False},
        "repeats": True,
        "transform": {"content": "{content}"} | {name: "{" + name + "}" for name in names if name in used},
    }
