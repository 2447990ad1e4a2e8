"""The arguments of a call as parts of a structural tag, for families that do not write them as one JSON object."""

from __future__ import annotations

import json
import re
from typing import Any, Final

import msgspec

from ipc.errors import InvalidRequest
from ipc.structured_outputs import MAX_STRUCTURE_BYTES
from pipeline.http.generation.answer_formats import Node
from pipeline.http.parsing.native_forms import XmlArguments
from pipeline.http.parsing.schema_types import resolved, types_of

_MAX_DEPTH: Final = 8  # of values inside values; deeper ones are written as JSON
_DEFINITIONS: Final = ("$defs", "definitions")
_ANY_NAME: Final = "[A-Za-z_][A-Za-z0-9_]{0,63}"
_NODE_BYTES: Final = 24  # less than the shortest part of a format has


class FormatBudget:
    """How much text the formats of a request's calls may still have.

    A format writes a definition wherever the schema refers to it, so a schema of a few references can make a format
    of any size. The budget ends the work as soon as the format is too large for a request.
    """

    def __init__(self) -> None:
        self._num_left = MAX_STRUCTURE_BYTES

    def spend(self, num_bytes: int) -> None:
        """Raises InvalidRequest if the formats are too large. `num_bytes`: at most what the text will have."""
        self._num_left -= num_bytes
        if self._num_left < 0:
            raise InvalidRequest(
                f"tools has parameters whose grammar would have more than {MAX_STRUCTURE_BYTES:,} bytes of text, which "
                "is the most that a request may have: make them smaller, with fewer optional ones and fewer references"
            )


def const(value: str) -> Node:
    return {"type": "const_string", "value": value}


def sequence(*elements: Node) -> Node:
    """Elements one after the other. Fixed texts that follow each other are joined, and empty ones left out."""
    joined: list[Node] = []
    for each in elements:
        if each["type"] == "const_string" and joined and joined[-1]["type"] == "const_string":
            joined[-1] = const(joined[-1]["value"] + each["value"])
        elif each != const(""):
            joined.append(each)
    return joined[0] if len(joined) == 1 else {"type": "sequence", "elements": joined or [const("")]}


def one_of(*elements: Node) -> Node:
    return elements[0] if len(elements) == 1 else {"type": "or", "elements": list(elements)}


def optional(element: Node) -> Node:
    return {"type": "optional", "content": element}


def json_value(schema: Any) -> Node:
    return {"type": "json_schema", "json_schema": schema}


def xml_arguments(schema: dict[str, Any], xml: XmlArguments, budget: FormatBudget) -> Node:
    """Arguments between tags, in the order of the schema. A text stands there as it is, anything else as JSON.

    Raises InvalidRequest if the budget is spent.
    """
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        if schema.get("additionalProperties") is False:
            return const("")
        name = {"type": "regex", "pattern": _ANY_NAME}
        return {
            "type": "star",
            "content": sequence(const(xml.key_begin), name, _xml_text(xml.key_end + xml.value_begin, {}, xml, budget)),
        }
    arguments, required = [], _required(schema)
    for key, value in properties.items():
        budget.spend(_NODE_BYTES + len(key))
        begin = f"{xml.key_begin}{key}{xml.key_end}{xml.value_begin}"
        values = _xml_values(value, schema, budget, _MAX_DEPTH)
        if values is None:
            argument = _xml_text(begin, resolved(value, schema), xml, budget)
        else:
            argument = sequence(const(begin), one_of(*values), const(xml.value_end))
        arguments.append(argument if key in required else optional(argument))
    return sequence(*arguments)


def _xml_values(schema: Any, root: dict[str, Any], budget: FormatBudget, depth: int) -> list[Node] | None:
    """The values that a schema allows, one or the other; None if they may be texts that it does not list."""
    budget.spend(_NODE_BYTES)
    schema = resolved(schema, root)
    if (listed := _listed_values(schema)) is not None:
        budget.spend(_size(listed))
        others = [value for value in listed if not isinstance(value, str)]
        texts = [const(value) for value in listed if isinstance(value, str)]
        return [*texts, json_value({"enum": others})] if others else texts
    for union in ("anyOf", "oneOf"):
        if depth and isinstance(choices := schema.get(union), list) and choices:
            values = [_xml_values(each, root, budget, depth - 1) for each in choices]
            return None if None in values else [node for nodes in values for node in nodes or ()]
    types = types_of(schema, root)
    return None if not types or "string" in types else [_json_part(schema, root, budget)]


def _xml_text(begin: str, schema: dict[str, Any], xml: XmlArguments, budget: FormatBudget) -> Node:
    """A text between `begin` and the end of a value. Its pattern and its length hold; a `format` does not."""
    end = xml.value_end.strip()
    patterns = []
    if isinstance(pattern := schema.get("pattern"), str):
        budget.spend(len(pattern))
        patterns.append(_whole(pattern))
    if "minLength" in schema or "maxLength" in schema:
        patterns.append(f"(?s:.{{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}})")
    if not patterns or schema.get("type") != "string":
        free = {"type": "tag", "begin": begin, "content": {"type": "any_text"}, "end": end}
        return sequence(free, const(xml.value_end[len(xml.value_end.rstrip()) :]))
    # One terminal, because a lexer does not come back to the end tag if the text can go on with its beginning.
    text = " & ".join(f"/{_in_lark(each)}/" for each in patterns)
    lark = f"start: TEXT\nTEXT: ({text} & ~/(?s:.*{_in_lark(re.escape(end))}.*)/) {json.dumps(xml.value_end)}"
    return sequence(const(begin), {"type": "grammar", "grammar": lark})


def _whole(pattern: str) -> str:
    """A pattern of a schema, which may match anywhere in a text, as one that matches the whole text."""
    is_end = pattern.endswith("$") and not pattern.endswith("\\$")
    inner = pattern.removeprefix("^").removesuffix("$" if is_end else "")
    return f"{'' if pattern.startswith('^') else '(?s:.*)'}(?:{inner}){'' if is_end else '(?s:.*)'}"


def _in_lark(pattern: str) -> str:
    """A regular expression as it stands between slashes."""
    return re.sub(r"\\.|/|\n", lambda found: {"/": r"\/", "\n": r"\n"}.get(found[0], found[0]), pattern)


def _required(schema: dict[str, Any]) -> set[str]:
    required = schema.get("required")
    return {each for each in required if isinstance(each, str)} if isinstance(required, list) else set()


def _listed_values(schema: dict[str, Any]) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


def python_arguments(schema: dict[str, Any], budget: FormatBudget) -> Node:
    """Arguments as Python writes them, `name=value, ...`: those that are required first.

    Raises InvalidRequest if the budget is spent.
    """
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        if schema.get("additionalProperties") is False:
            return const("")
        argument = sequence({"type": "regex", "pattern": _ANY_NAME}, const("="), json_value({}))
        return optional(_listed(argument))
    nodes = {
        key: sequence(const(f"{key}="), _python_value(value, schema, budget, _MAX_DEPTH))
        for key, value in properties.items()
    }
    return _with_optional(nodes, _required(schema), budget)


def _with_optional(nodes: dict[str, Node], names: set[str], budget: FormatBudget) -> Node:
    """Elements with commas between them, those with these names first. Each of the others may be missing."""
    required = [node for key, node in nodes.items() if key in names]
    others = [node for key, node in nodes.items() if key not in names]
    comma = const(", ")

    def behind(index: int) -> list[Node]:
        budget.spend(_NODE_BYTES * (len(others) - index))
        return [optional(sequence(comma, each)) for each in others[index:]]

    if required:
        first, *more = required
        return sequence(first, *(part for each in more for part in (comma, each)), *behind(0))
    if not others:
        return const("")
    return optional(one_of(*(sequence(each, *behind(i + 1)) for i, each in enumerate(others))))


def _listed(element: Node) -> Node:
    return sequence(element, {"type": "star", "content": sequence(const(", "), element)})


def _python_value(schema: Any, root: dict[str, Any], budget: FormatBudget, depth: int) -> Node:
    """A value as a Python literal. A schema that says nothing of the type allows any JSON."""
    schema = resolved(schema, root)
    budget.spend(_NODE_BYTES + len(schema))  # the schema is copied below
    if (listed := _listed_values(schema)) is not None:
        budget.spend(_size(listed))
        return one_of(*(const(_literal(value)) for value in listed))
    for union in ("anyOf", "oneOf"):
        if depth and isinstance(choices := schema.get(union), list) and choices:
            return one_of(*(_python_value(each, root, budget, depth - 1) for each in choices))
    types = schema.get("type")
    if isinstance(types, list) and types:
        return one_of(*(_python_value({**schema, "type": each}, root, budget, depth) for each in types))
    if types == "boolean":
        return one_of(const("True"), const("False"))
    if types == "null":
        return const("None")
    if depth and types == "array" and not schema.keys() & {"minItems", "maxItems", "prefixItems", "uniqueItems"}:
        items = _python_value(schema.get("items", {}), root, budget, depth - 1)
        return sequence(const("["), optional(_listed(items)), const("]"))
    if depth and types == "object" and isinstance(properties := schema.get("properties"), dict):
        nodes = {
            key: sequence(const(f"{json.dumps(key)}: "), _python_value(value, root, budget, depth - 1))
            for key, value in properties.items()
        }
        return sequence(const("{"), _with_optional(nodes, _required(schema), budget), const("}"))
    return _json_part(schema, root, budget)


def _literal(value: Any) -> str:
    """A value of a schema as a Python literal, with texts as JSON writes them."""
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {_literal(each)}" for key, each in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _json_part(schema: dict[str, Any], root: dict[str, Any], budget: FormatBudget) -> Node:
    """A value as JSON. Its schema has the definitions of the whole schema with it."""
    schema = {**{key: root[key] for key in _DEFINITIONS if key in root}, **schema}
    budget.spend(_size(schema))
    return json_value(schema)


def _size(value: Any) -> int:
    """Bytes of a JSON value, at most."""
    return len(msgspec.json.encode(value))
