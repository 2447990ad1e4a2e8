"""Reads the types of a value from its JSON schema. Parsers and grammars of calls must agree on them."""

from __future__ import annotations

from typing import Any, Final

_DEFINITIONS: Final = ("$defs", "definitions")
_MAX_DEPTH: Final = 8


def resolved(schema: Any, root: Any) -> dict[str, Any]:
    """The schema that a reference into the definitions of `root` names, or that stands alone in `allOf`.

    Any other schema is returned as it is. A value that has no keywords becomes {}, which allows everything.
    """
    for _ in range(_MAX_DEPTH):
        if not isinstance(schema, dict):
            break
        reference, parts = schema.get("$ref"), schema.get("allOf")
        if isinstance(parts, list) and len(parts) == 1 and reference is None and "type" not in schema:
            schema = parts[0]
            continue
        if not isinstance(reference, str):
            break
        kind, _, name = reference.removeprefix("#/").partition("/")
        definitions = root.get(kind) if kind in _DEFINITIONS and isinstance(root, dict) else None
        if not isinstance(definitions, dict) or name not in definitions:
            break
        schema = definitions[name]
    return schema if isinstance(schema, dict) else {}


def types_of(schema: Any, root: Any) -> set[str]:
    """The names of the types that a schema allows; empty if it names none. `root` holds its definitions."""
    return _types(schema, root, _MAX_DEPTH, {})


def type_of(value: Any) -> set[str]:
    """The names of a value's types in JSON Schema."""
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, int):
        return {"integer", "number"}
    kinds = {float: "number", str: "string", list: "array", tuple: "array", dict: "object"}
    return {kinds.get(type(value), "null")}


def _types(schema: Any, root: Any, depth: int, known: dict[tuple[int, int], set[str]]) -> set[str]:
    """`known` holds the types of schemas by identity and depth, because references may lead to one in many ways."""
    schema = resolved(schema, root)
    if not depth or not schema:
        return set()
    types = known.get((id(schema), depth))
    if types is None:
        types = known[id(schema), depth] = _new_types(schema, root, depth, known)
    return types


def _new_types(schema: dict[str, Any], root: Any, depth: int, known: dict[tuple[int, int], set[str]]) -> set[str]:
    declared = schema.get("type")
    names = declared if isinstance(declared, list) else [declared]
    types = {each for each in names if isinstance(each, str)}
    if schema.get("nullable") is True:
        types.add("null")
    for union in ("anyOf", "oneOf", "allOf"):
        choices = schema.get(union)
        for choice in choices if isinstance(choices, list) else ():
            types |= _types(choice, root, depth - 1, known)
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if not types and isinstance(values, list):
        for value in values:
            types |= type_of(value)
    return types
