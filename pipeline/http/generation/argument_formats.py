"""The arguments of a call as parts of a structural tag, for families that do not write them as one JSON object."""

from __future__ import annotations

import json
from typing import Any, Final

from pipeline.http.generation.answer_formats import Node
from pipeline.http.parsing.native_forms import XmlArguments

_MAX_DEPTH: Final = 8  # of values inside values; deeper ones are written as JSON
_DEFINITIONS: Final = ("$defs", "definitions")
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


def xml_arguments(schema: dict[str, Any], xml: XmlArguments) -> Node:
    """Arguments between tags, in the order of the schema. A text stands there as it is, anything else as JSON.

    A text ends at the end tag. Its pattern is certain, or else its length; its `format` is not.
    """
    tail = xml.value_end[len(xml.value_end.rstrip()) :]

    def text_up_to_end(begin: str, text: Node) -> list[Node]:
        return [{"type": "tag", "begin": begin, "content": text, "end": xml.value_end.strip()}, const(tail)]

    properties = schema.get("properties")
    if not isinstance(properties, dict):
        if schema.get("additionalProperties") is False:
            return const("")
        name = {"type": "regex", "pattern": _ANY_NAME}
        value = text_up_to_end(xml.key_end + xml.value_begin, {"type": "any_text"})
        return {"type": "star", "content": sequence(const(xml.key_begin), name, *value)}
    arguments = []
    for key, value_schema in properties.items():
        begin = f"{xml.key_begin}{key}{xml.key_end}{xml.value_begin}"
        value_schema = _resolved(value_schema, schema)
        texts, others = _alternatives(value_schema)
        if texts is None:
            argument = sequence(*text_up_to_end(begin, _text(value_schema)))
        else:
            values = [*map(const, texts)]
            if others:
                values.append(json_value(_with_definitions(others, schema)))
            argument = sequence(const(begin), one_of(*values), const(xml.value_end))
        arguments.append(argument if key in schema.get("required", ()) else optional(argument))
    return sequence(*arguments)


def python_arguments(schema: dict[str, Any]) -> Node:
    """Arguments as Python writes them, `name=value, ...`: those that are required first."""
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        if schema.get("additionalProperties") is False:
            return const("")
        argument = sequence({"type": "regex", "pattern": _ANY_NAME}, const("="), json_value({}))
        return optional(_listed(argument))
    required = [key for key in properties if key in schema.get("required", ())]
    others = [key for key in properties if key not in required]
    nodes = {
        key: sequence(const(f"{key}="), _python_value(value, schema, _MAX_DEPTH)) for key, value in properties.items()
    }
    return _with_optional([nodes[key] for key in required], [nodes[key] for key in others])


def _with_optional(required: list[Node], others: list[Node]) -> Node:
    """Elements with commas between them. Each of `others` may be missing."""
    comma = const(", ")

    def behind(index: int) -> list[Node]:
        return [optional(sequence(comma, each)) for each in others[index:]]

    if required:
        first, *more = required
        return sequence(first, *(part for each in more for part in (comma, each)), *behind(0))
    if not others:
        return const("")
    return optional(one_of(*(sequence(each, *behind(i + 1)) for i, each in enumerate(others))))


def _listed(element: Node) -> Node:
    return sequence(element, {"type": "star", "content": sequence(const(", "), element)})


def _python_value(schema: Any, root: dict[str, Any], depth: int) -> Node:
    """A value as a Python literal. A schema that says nothing of the type allows any JSON."""
    schema = _resolved(schema, root)
    if "const" in schema or isinstance(schema.get("enum"), list):
        values = [schema["const"]] if "const" in schema else schema["enum"]
        return one_of(*(const(_literal(value)) for value in values))
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
        required = [key for key in properties if key in schema.get("required", ())]
        inner = _with_optional([nodes[key] for key in required], [nodes[key] for key in nodes if key not in required])
        return sequence(const("{"), inner, const("}"))
    return json_value(_with_definitions(schema, root))


def _literal(value: Any) -> str:
    """A value of a schema as a Python literal, with texts as JSON writes them."""
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {_literal(each)}" for key, each in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _alternatives(schema: dict[str, Any]) -> tuple[list[str] | None, dict[str, Any] | None]:
    """The texts that a schema lists, and a schema of its other values. (None, None): it allows texts of any kind."""
    if "const" in schema or isinstance(schema.get("enum"), list):
        values = [schema["const"]] if "const" in schema else schema["enum"]
        others = [value for value in values if not isinstance(value, str)]
        return [value for value in values if isinstance(value, str)], {"enum": others} if others else None
    types = schema.get("type")
    if types is None or types == "string" or (isinstance(types, list) and "string" in types):
        return None, None
    return [], schema


def _text(schema: dict[str, Any]) -> Node:
    """A text as it stands between tags. Where other types are allowed too, nothing more is certain."""
    pattern, low, high = schema.get("pattern"), schema.get("minLength", 0), schema.get("maxLength", "")
    if schema.get("type") == "string" and isinstance(pattern, str):
        begin = "" if pattern.startswith("^") else ".*"
        end = "" if pattern.endswith("$") and not pattern.endswith("\\$") else ".*"
        inner = pattern.removeprefix("^").removesuffix("" if end else "$")
        return {"type": "regex", "pattern": f"(?s:{begin})(?:{inner})(?s:{end})"}
    if schema.get("type") == "string" and (low or high != ""):
        return {"type": "regex", "pattern": f"(?s:.{{{low},{high}}})"}
    return {"type": "any_text"}


def _resolved(schema: Any, root: dict[str, Any]) -> dict[str, Any]:
    """The schema that a reference into the definitions names; any other schema as it is."""
    for _ in range(_MAX_DEPTH):
        reference = schema.get("$ref") if isinstance(schema, dict) else None
        if not isinstance(reference, str):
            break
        kind, _, name = reference.removeprefix("#/").partition("/")
        target = root.get(kind, {}).get(name) if kind in _DEFINITIONS else None
        if not isinstance(target, dict):
            break
        schema = target
    return schema if isinstance(schema, dict) else {}


def _with_definitions(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    return {**{key: root[key] for key in _DEFINITIONS if key in root}, **schema}
