"""Calls of tools as a structural tag: the grammar of the text that a family of models writes for them."""

from __future__ import annotations

import re
from typing import Any, Final

from pipeline.http.generation.answer_formats import Node
from pipeline.http.generation.argument_formats import (
    FormatBudget,
    const,
    json_value,
    one_of,
    python_arguments,
    sequence,
    xml_arguments,
)
from pipeline.http.generation.tool_definitions import parameters_of
from pipeline.http.parsing.families import HARMONY
from pipeline.http.parsing.native_forms import NativeForm
from pipeline.http.parsing.scanner import Tool
from workers.grammar.origin import SOURCE

# For models of no known family: the parser takes an answer that is one call object for a call.
BARE_CALL: Final = NativeForm(trigger="", begin='{"name": "', middle='", "parameters": ', end="}", separator=", ")
FINAL_ANSWER: Final = {HARMONY: "<|channel|>final<|message|>"}  # text that a family writes before an answer
_ANY_OBJECT: Final = {"type": "object"}
_INDEX: Final = "[0-9]{1,3}"
_LIKE_CALLS: Final = {  # beginnings that parsers read as calls, of families without a marker
    "json": r'/[\s\[]*\{\s*"(name|arguments|parameters|type|id)"(?s:.*)/',
    "python": r"/\s*\[\s*[\w.:\/-]+\s*\((?s:.*)/",
}


def parameters_source(tool: Tool) -> str:
    """The field of a request that the grammar of a tool's arguments comes from, for errors."""
    return f"tools: the parameters of {tool['name']!r}"


class CallFormats:
    """The calls of some tools in one family's form.

    Args:
        form: the family's.
        tools: those that may be called.
        follows_schemas: every call follows its tool's schema; otherwise only those of tools that are `strict`.
        is_parallel: there may be more calls than one.

    Raises InvalidRequest if their formats have more text than a request may have.
    """

    def __init__(self, form: NativeForm, tools: list[Tool], *, follows_schemas: bool, is_parallel: bool) -> None:
        self._form: Final = form
        self._is_parallel: Final = is_parallel and form.allows_parallel_calls
        self._follows_schemas: Final = follows_schemas
        self._tools: Final = tools
        self._budget: Final = FormatBudget()
        self._tags: Final = [self._call(tool) for tool in tools]

    def calls(self) -> Node:
        """A text that consists of at least one call."""
        form = self._form
        return sequence(const(form.section_begin), self._listed(), const(form.section_end))

    def calls_or_text(self, final_answer: str = "") -> Node:
        """Free text with calls in it. Where the family has no marker that begins a call, one or the other.

        `final_answer`: text that the family writes before an answer.
        """
        form = self._form
        if final_answer:
            return one_of(self.calls(), sequence(const(final_answer), {"type": "any_text"}))
        if not form.trigger:
            like_calls = [_LIKE_CALLS[form.arguments]]
            like_calls += [f"/(?s:.*{re.escape(each)}.*)/" for each in form.more_markers]
            lark = f"start: TEXT\nTEXT: /(?s:.*)/ & ~({' | '.join(like_calls)})"
            return one_of(self._calls_told_from_text(), {"type": "grammar", "grammar": lark})
        triggers, tags = [form.trigger], self._tags
        if form.section_begin:
            tags = [{"type": "tag", "begin": form.section_begin, "content": self._listed(), "end": form.section_end}]
        if form.arguments == "xml" and (inner := form.begin.removeprefix(form.trigger).strip()):
            # Its parser also reads calls without the trigger.
            triggers.append(inner)
            outer, end = form.begin.removesuffix(inner), form.end.split("\n")[0]
            bare = ({**tag, "begin": tag["begin"].removeprefix(outer), "end": end} for tag in self._tags)
            tags = [*tags, *bare]
        return {
            "type": "triggered_tags", "triggers": triggers, "tags": tags,
            "stop_after_first": bool(form.section_begin) or not self._is_parallel,
        }  # fmt: skip

    def calls_or_json(self, answer: Node, final_answer: str = "") -> Node:
        """Calls, or JSON that a schema describes.

        Bare calls are JSON too, and llguidance cannot tell two forms of JSON apart token by token. So both are one
        schema then, which allows one call.
        """
        form = self._form
        if form.trigger or form.arguments != "json":
            return one_of(self.calls(), sequence(const(final_answer), answer))
        key = next(each for each in ("parameters", "arguments") if each in form.middle)
        schemas: list[Any] = []
        for tool in self._tools:
            inside = f"#/anyOf/{len(schemas)}/properties/{key}"
            properties = {"name": {"const": tool["name"]}, key: _moved(self._schema(tool), inside)}
            schemas.append(
                {"type": "object", "properties": properties, "required": ["name", key], "additionalProperties": False}
            )
        return json_value({"anyOf": [*schemas, _moved(answer["json_schema"], f"#/anyOf/{len(schemas)}")]})

    def _calls_told_from_text(self) -> Node:
        """The same as `calls`. The text up to the first name is one literal: a lexer that could go on with free text
        behind a shorter one would do so."""
        form = self._form
        if not form.section_begin:
            return self.calls()
        first = one_of(*({**tag, "begin": form.section_begin + tag["begin"]} for tag in self._tags))
        more = {"type": "star", "content": sequence(const(form.separator), one_of(*self._tags))}
        return sequence(first, *([more] if self._is_parallel else []), const(form.section_end))

    def _listed(self) -> Node:
        return {
            "type": "tags_with_separator", "tags": self._tags, "separator": self._form.separator,
            "at_least_one": True, "stop_after_first": not self._is_parallel,
        }  # fmt: skip

    def _schema(self, tool: Tool) -> dict[str, Any]:
        return parameters_of(tool) if self._follows_schemas or tool.get("strict") else _ANY_OBJECT

    def _call(self, tool: Tool) -> Node:
        form = self._form
        before, has_index, after = form.middle.partition("{index}")
        index = [{"type": "regex", "pattern": _INDEX}, const(after)] if has_index else []
        # A call that ends the answer ends with a token that ends the sequence: the grammar is complete before it.
        end = form.end if form.allows_parallel_calls else ""
        content = sequence(*index, self._arguments(self._schema(tool)))
        return {
            "type": "tag", "begin": f"{form.begin}{tool['name']}{before}", "content": content, "end": end,
            SOURCE: parameters_source(tool),
        }  # fmt: skip

    def _arguments(self, schema: dict[str, Any]) -> Node:
        if self._form.arguments == "python":
            return python_arguments(schema, self._budget)
        if self._form.arguments == "xml":
            assert self._form.xml is not None, "a form with XML arguments says how they are written"
            return xml_arguments(schema, self._form.xml, self._budget)
        return json_value(schema)


def _moved(schema: Any, pointer: str) -> Any:
    """A schema with its references to itself as they must be where `pointer` says."""
    if isinstance(schema, list):
        return [_moved(each, pointer) for each in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, pointer) for key, value in schema.items()}
    if isinstance(reference := schema.get("$ref"), str) and reference.startswith("#"):
        moved["$ref"] = pointer + reference[1:]
    return moved
