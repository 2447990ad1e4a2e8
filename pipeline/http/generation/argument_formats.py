"""The arguments of a call as parts of a structural tag, for families that do not write them as one JSON object."""

from __future__ import annotations

import json
import re
from typing import Any, Final

from pipeline.http.generation.answer_formats import Node
from pipeline.http.generation.grammar_room import NODE_BYTES, GrammarRoom, RootSchema
from pipeline.http.parsing.native_forms import XmlArguments
from pipeline.http.parsing.schema_types import resolved, types_of

_MAX_DEPTH: Final = 8  # of values inside values; deeper ones are written as JSON
_ANY_NAME: Final = "[A-Za-z_][A-Za-z0-9_]{0,63}"


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


def xml_arguments(schema: dict[str, Any], xml: XmlArguments, room: GrammarRoom) -> Node:
    """Arguments between tags, in the order of the schema. A text stands there as it is, anything else as JSON.

    Raises InvalidRequest if there is not enough room.
    """
    root = RootSchema(schema, room)
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        if schema.get("additionalProperties") is False:
            return const("")
        name = {"type": "regex", "pattern": _ANY_NAME}
        return {
            "type": "star",
            "content": sequence(const(xml.key_begin), name, _xml_text(xml.key_end + xml.value_begin, {}, xml)),
        }
    arguments = []
    for key, value in properties.items():
        begin = f"{xml.key_begin}{key}{xml.key_end}{xml.value_begin}"
        values = _xml_values(value, root, _MAX_DEPTH)
        if values is None:
            argument = _xml_text(begin, resolved(value, schema), xml)
        else:
            argument = sequence(const(begin), one_of(*values), const(xml.value_end))
        arguments.append(argument if key in _required(schema) else optional(argument))
    return sequence(*arguments)


def _xml_values(schema: Any, root: RootSchema, depth: int) -> list[Node] | None:
    """The values that a schema allows, one or the other; None if they may be texts that it does not list."""
    root.room.take()
    schema = resolved(schema, root.schema)
    if (listed := _listed_values(schema)) is not None:
        root.room.take(NODE_BYTES * len(listed))
        others = [value for value in listed if not isinstance(value, str)]
        texts = [const(value) for value in listed if isinstance(value, str)]
        return [*texts, json_value({"enum": others})] if others else texts
    for union in ("anyOf", "oneOf"):
        if depth and isinstance(choices := schema.get(union), list) and choices:
            values = [_xml_values(each, root, depth - 1) for each in choices]
            return None if None in values else [node for nodes in values for node in nodes or ()]
    types = types_of(schema, root.schema)
    return None if not types or "string" in types else [json_value(root.with_definitions(schema))]


def _xml_text(begin: str, schema: dict[str, Any], xml: XmlArguments) -> Node:
    """A text between `begin` and the end of a value. Its pattern and its length hold; a `format` does not."""
    end = xml.value_end.strip()
    patterns = []
    if isinstance(pattern := schema.get("pattern"), str):
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


def _required(schema: dict[str, Any]) -> list[Any]:
    required = schema.get("required")
    return required if isinstance(required, list) else []


def _listed_values(schema: dict[str, Any]) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


def python_arguments(schema: dict[str, Any], room: GrammarRoom) -> Node:
    """Arguments as Python writes them, `name=value, ...`: those that are required first.

    Raises InvalidRequest if there is not enough room.
    """
    root = RootSchema(schema, room)
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        if schema.get("additionalProperties") is False:
            return const("")
        argument = sequence({"type": "regex", "pattern": _ANY_NAME}, const("="), json_value({}))
        return optional(_listed(argument))
    required = [key for key in properties if key in _required(schema)]
    others = [key for key in properties if key not in required]
    nodes = {
        key: sequence(const(f"{key}="), _python_value(value, root, _MAX_DEPTH)) for key, value in properties.items()
    }
    return _with_optional([nodes[key] for key in required], [nodes[key] for key in others], room)


def _with_optional(required: list[Node], others: list[Node], room: GrammarRoom) -> Node:
    """Elements with commas between them. Each of `others` may be missing."""
    comma = const(", ")

    def behind(index: int) -> list[Node]:
        return [optional(sequence(comma, each)) for each in others[index:]]

    if required:
        first, *more = required
        return sequence(first, *(part for each in more for part in (comma, each)), *behind(0))
    if not others:
        return const("")
    room.take(NODE_BYTES * len(others) * (len(others) + 1) // 2)
    return optional(one_of(*(sequence(each, *behind(i + 1)) for i, each in enumerate(others))))


def _listed(element: Node) -> Node:
    return sequence(element, {"type": "star", "content": sequence(const(", "), element)})


def _python_value(schema: Any, root: RootSchema, depth: int) -> Node:
    """A value as a Python literal. A schema that says nothing of the type allows any JSON."""
    root.room.take()
    schema = resolved(schema, root.schema)
    if (listed := _listed_values(schema)) is not None:
        root.room.take(NODE_BYTES * len(listed))
        return one_of(*(const(_literal(value)) for value in listed))
    for union in ("anyOf", "oneOf"):
        if depth and isinstance(choices := schema.get(union), list) and choices:
            return one_of(*(_python_value(each, root, depth - 1) for each in choices))
    types = schema.get("type")
    if isinstance(types, list) and types:
        return one_of(*(_python_value({**schema, "type": each}, root, depth) for each in types))
    if types == "boolean":
        return one_of(const("True"), const("False"))
    if types == "null":
        return const("None")
    if depth and types == "array" and not schema.keys() & {"minItems", "maxItems", "prefixItems", "uniqueItems"}:
        items = _python_value(schema.get("items", {}), root, depth - 1)
        return sequence(const("["), optional(_listed(items)), const("]"))
    if depth and types == "object" and isinstance(properties := schema.get("properties"), dict):
        nodes = {
            key: sequence(const(f"{json.dumps(key)}: "), _python_value(value, root, depth - 1))
            for key, value in properties.items()
        }
        required = [key for key in properties if key in _required(schema)]
        others = [nodes[key] for key in nodes if key not in required]
        inner = _with_optional([nodes[key] for key in required], others, root.room)
        return sequence(const("{"), inner, const("}"))
    return json_value(root.with_definitions(schema))


def _literal(value: Any) -> str:
    """A value of a schema as a Python literal, with texts as JSON writes them."""
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {_literal(each)}" for key, each in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
