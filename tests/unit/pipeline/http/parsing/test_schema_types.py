"""The types that a JSON schema names."""

from __future__ import annotations

from typing import Any, Final

import pytest

from pipeline.http.parsing.schema_types import resolved, types_of

ROOT: Final = {
    "$defs": {"A": {"type": "string"}, "B": {"$ref": "#/$defs/A"}, "Loop": {"$ref": "#/$defs/Loop"}},
    "definitions": {"A": {"type": ["integer", "null"]}},
}


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({"type": "string"}, {"string"}),
        ({"$ref": "#/$defs/B"}, {"string"}),
        ({"$ref": "#/definitions/A"}, {"integer", "null"}),
        ({"anyOf": [{"$ref": "#/$defs/A"}, {"type": "null"}]}, {"string", "null"}),
        ({"allOf": [{"$ref": "#/$defs/A"}], "title": "T"}, {"string"}),
        ({"type": "boolean", "nullable": True}, {"boolean", "null"}),
        ({"enum": [1, "a", True]}, {"integer", "number", "string", "boolean"}),
        ({"const": None}, {"null"}),
        ({"$ref": "#/$defs/Missing"}, set()),
        ({"$ref": "https://example.com"}, set()),
        ({"$ref": "#/$defs/Loop"}, set()),
        ({"type": 5, "anyOf": 6, "enum": 7}, set()),
        (True, set()),
        (None, set()),
    ],
)
def test_a_schema_s_types_are_found_behind_references_and_in_unions(schema: Any, types: set[str]) -> None:
    assert types_of(schema, ROOT) == types


def test_a_reference_needs_definitions_that_hold_it() -> None:
    assert resolved({"$ref": "#/$defs/A"}, {"$defs": 5}) == {"$ref": "#/$defs/A"}
    assert resolved({"$ref": "#/$defs/A"}, None) == {"$ref": "#/$defs/A"}
    assert resolved({"$ref": "#/$defs/B"}, ROOT) == {"type": "string"}


def test_schemas_that_refer_to_each_other_many_times_are_read_once_each() -> None:
    names = [f"S{i}" for i in range(50)]
    everything = {"anyOf": [{"$ref": f"#/$defs/{name}"} for name in names] * 50}
    root = {"$defs": {**dict.fromkeys(names, everything), "S7": {"type": "null"}, "S9": {"enum": [1.5]}}}
    assert types_of(everything, root) == {"null", "number"}
    deep: dict[str, Any] = {"type": "null"}
    for _ in range(5_000):
        deep = {"anyOf": [deep]}
    assert types_of(deep, {}) == set()
