"""Reads the form that a request asks of its answer: `response_format`, or `structured_outputs` as in vLLM's API."""

from __future__ import annotations

import json
import reprlib
from typing import Any, Final

from ipc.errors import InvalidRequest
from ipc.structured_outputs import StructuredOutputs
from pipeline.http.generation.tool_definitions import checked_name
from workers.grammar.origin import SOURCE, field_of

Node = dict[str, Any]  # a format of a structural tag
_FORMATS: Final = ("text", "json_object", "json_schema", "structural_tag")
_FIELDS: Final = StructuredOutputs.__struct_fields__
_IGNORED: Final = "disable_fallback"  # vLLM: another library may compile the grammar


def read_answer_format(response_format: Any, structured_outputs: Any) -> StructuredOutputs | None:
    """The constraint of the answer; None: free text. Raises InvalidRequest, naming the field."""
    by_format = None if response_format is None else _of_response_format(response_format)
    given = None if structured_outputs is None else _of_fields(structured_outputs)
    if by_format is not None and given is not None:
        raise InvalidRequest(
            f"structured_outputs (with {given.constraint}) and response_format (of type "
            f"{response_format['type']!r}) are both given: give one of them"
        )
    return by_format or given


def as_node(spec: StructuredOutputs) -> Node:
    """The constraint as a part of a structural tag. It must not be a structural tag itself."""
    return _node(spec) | {SOURCE: field_of(spec)}


def _node(spec: StructuredOutputs) -> Node:
    if spec.choice is not None:
        # One terminal, because a choice may begin another one.
        lark = f"start: CHOICE\nCHOICE: {' | '.join(map(json.dumps, spec.choice))}"
        return {"type": "grammar", "grammar": lark}
    if spec.regex is not None:
        return {"type": "regex", "pattern": spec.regex}
    if spec.grammar is not None:
        return {"type": "grammar", "grammar": spec.grammar}
    if spec.json is None:
        return {"type": "json_schema", "json_schema": {"type": "object"}}
    try:
        schema = json.loads(str(spec.json))
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"structured_outputs.json is not valid JSON: {error}") from None
    return {"type": "json_schema", "json_schema": schema}


def _of_response_format(value: Any) -> StructuredOutputs | None:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in _FORMATS:
        wrong = reprlib.repr(kind if isinstance(value, dict) else value)
        where = "response_format.type" if isinstance(value, dict) else "response_format"
        raise InvalidRequest(f"{where} ({wrong}) must be {', '.join(map(repr, _FORMATS[:-1]))} or {_FORMATS[-1]!r}")
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputs(json_object=True)
    if kind == "structural_tag":
        return StructuredOutputs(structural_tag=json.dumps(value, ensure_ascii=False))
    where = "response_format.json_schema"
    if not isinstance(inner := value.get("json_schema"), dict):
        raise InvalidRequest(f"{where} ({reprlib.repr(inner)}) must be an object with a name and a schema")
    checked_name(inner.get("name"), f"{where}.name")
    if not isinstance(schema := inner.get("schema"), dict):
        raise InvalidRequest(f"{where}.schema ({reprlib.repr(schema)}) must be an object with a JSON schema")
    return StructuredOutputs(json=schema)


def _of_fields(value: Any) -> StructuredOutputs | None:
    if not isinstance(value, dict):
        raise InvalidRequest(f"structured_outputs ({reprlib.repr(value)}) must be an object")
    given = {name: each for name, each in value.items() if each is not None and name != _IGNORED}
    for name in given:
        if name not in _FIELDS:
            raise InvalidRequest(f"structured_outputs has a field {name[:100]!r}: its fields are {', '.join(_FIELDS)}")
    if isinstance(tag := given.get("structural_tag"), dict):
        given["structural_tag"] = json.dumps(tag, ensure_ascii=False)
    return StructuredOutputs(**given) if given else None
