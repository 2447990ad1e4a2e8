"""Turns a JSON schema and its options into the form that llguidance compiles."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final

from ipc.errors import InvalidRequest
from ipc.structured_outputs import StructuredOutputs

# At most a space, or a line break with an indentation: a model cannot go on with whitespace for ever.
DEFAULT_WHITESPACE: Final = r"\x20|\r?\n[\x20\t]{0,40}"
_SPACE: Final = r"[\x20\t\r\n]"  # what JSON calls whitespace, for \s
_WHITESPACE_PATTERN: Final = re.compile(
    r"(?:[ \t\r\n]|\\[ntrs]|\\x(?:20|09|0[aAdD])|\{\d{1,4}(?:,\d{0,4})?\}|[\[\]()|?*+]|\(\?:)+"
)
# A JSON schema may name any format. A validator must not check a format that the standard does not define.
_STANDARD_FORMATS: Final = frozenset(
    ("date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname", "ipv4", "ipv6", "uri",
     "uri-reference", "iri", "iri-reference", "uuid", "uri-template", "json-pointer", "relative-json-pointer", "regex")
)  # fmt: skip
_MAPS_OF_SCHEMAS: Final = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_DATA: Final = ("const", "enum", "default", "examples", "required")


def json_options(spec: StructuredOutputs) -> dict[str, Any]:
    """llguidance's options for the JSON of a request. A keyword that it cannot enforce is an error with these.

    Raises InvalidRequest for a whitespace_pattern that could match anything else than JSON's whitespace.
    """
    options: dict[str, Any] = {"lenient": False, "coerce_one_of": False, "item_separator": ",", "key_separator": ":"}
    pattern = spec.whitespace_pattern
    if spec.disable_any_whitespace:
        return {**options, "whitespace_flexible": False}
    if pattern is not None and _WHITESPACE_PATTERN.fullmatch(pattern) is None:
        raise InvalidRequest(
            f"whitespace_pattern ({pattern[:100]!r}) may hold only spaces, \\n, \\t, \\r, \\s, groups, sets, | and "
            "repetitions: other characters would make the JSON invalid"
        )
    whitespace = DEFAULT_WHITESPACE if pattern is None else pattern.replace(r"\s", _SPACE)
    return {**options, "whitespace_flexible": True, "whitespace_pattern": whitespace}


def prepared_schema(text: str, spec: StructuredOutputs) -> str:
    """The schema's text, with additional properties disabled if the request asks for that, and without formats that the
    standard does not define. Raises InvalidRequest for text that is not JSON."""
    if not spec.disable_additional_properties and '"format"' not in text:
        return text  # llguidance reads it without the interpreter's lock
    schema = parsed_json(text, spec.constraint)
    prepare_schema(schema, spec)
    return json.dumps(schema, ensure_ascii=False)


def prepare_schema(schema: Any, spec: StructuredOutputs) -> None:
    """The same for a parsed schema, in place."""
    for part in _subschemas(schema):
        named = part.get("format")
        if isinstance(named, str) and named not in _STANDARD_FORMATS:
            del part["format"]
        if spec.disable_additional_properties and ("properties" in part or "patternProperties" in part):
            part.setdefault("additionalProperties", False)


def parsed_json(text: str, field: str) -> Any:
    """Raises InvalidRequest, naming the field, for text that is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        problem = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise InvalidRequest(f"{field} is not valid JSON: {problem}") from None


def _subschemas(schema: Any) -> Iterator[dict[str, Any]]:
    """All objects of a schema that are schemas themselves."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting.extend(part)
        elif isinstance(part, dict):
            yield part
            for key, value in part.items():
                if key in _MAPS_OF_SCHEMAS and isinstance(value, dict):
                    waiting.extend(value.values())
                elif key not in _DATA:
                    waiting.append(value)
