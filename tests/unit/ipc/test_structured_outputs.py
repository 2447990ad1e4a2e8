from __future__ import annotations

import json

import pytest

from ipc.codec import decode, encode
from ipc.errors import InvalidRequest
from ipc.structured_outputs import MAX_CHOICES, MAX_STRUCTURE_BYTES, StructuredOutputs

ONE_OF = (
    "structured_outputs must have exactly one of json, regex, choice, grammar, json_object, structural_tag, and has "
)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, ONE_OF + "none of them"),
        ({"json_object": False}, ONE_OF + "none of them"),
        ({"json": "{}", "regex": "a"}, ONE_OF + "json and regex"),
        ({"json": 5}, "json (5) must be a JSON schema (a dict, or its text), or None"),
        ({"json": ""}, "json ('') must be a JSON schema (a dict, or its text), or None"),
        (
            {"json": {"const": {1}}},
            "json is a dict that is no JSON schema: Object of type set is not JSON serializable",
        ),
        ({"json": {"const": float("nan")}}, "json is a dict that is no JSON schema: Out of range float values"),
        ({"regex": ["a"]}, "regex (['a']) must be a string that is not empty, or None"),
        ({"choice": []}, "choice ([]) must be a list of 1 to 1024 strings, or None"),
        ({"choice": ["a", 1]}, "choice (['a', 1]) must be a list of 1 to 1024 strings, or None"),
        ({"choice": "ab"}, "choice ('ab') must be a list of 1 to 1024 strings, or None"),
        ({"choice": ["a"] * (MAX_CHOICES + 1)}, "choice (['a', 'a', 'a', 'a', 'a', 'a', ...]) must be a list of 1 to"),
        ({"json_object": 1}, "json_object (1) must be true, false or None"),
        (
            {"json": "{}", "disable_any_whitespace": True, "whitespace_pattern": " "},
            "whitespace_pattern (' ') and disable_any_whitespace (True) contradict each other: give one of them",
        ),
        (
            {"regex": "é" * (MAX_STRUCTURE_BYTES // 2 + 1)},
            "regex has 262,146 bytes of text, more than the 262,144 that a request may have: make it smaller",
        ),
        ({"regex": "a", "after_reasoning": "</think>"}, "after_reasoning ('</think>') must be a list of at most 2"),
        ({"regex": "a", "after_reasoning": ["a", "b", "c"]}, "after_reasoning (['a', 'b', 'c']) must be a list of at"),
        (
            {"regex": "a", "after_reasoning": [""]},
            "after_reasoning (['']) must be a list of at most 2 strings that are",
        ),
        ({"regex": "a", "after_reasoning": ["x" * MAX_STRUCTURE_BYTES]}, "regex has 262,145 bytes of text"),
        ({"choice": ["x" * 1000] * 300}, "choice has 300,000 bytes of text, more than the 262,144"),
    ],
)
def test_a_bad_constraint_is_refused_with_field_value_and_cure(fields, text):
    with pytest.raises(InvalidRequest) as caught:
        StructuredOutputs(**fields)
    assert str(caught.value).startswith(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"json": {"type": "object", "properties": {"b": {}, "a": {}}}},
        {"json": '{"type":"string"}', "disable_any_whitespace": True, "disable_additional_properties": True},
        {"regex": "x" * MAX_STRUCTURE_BYTES},
        {"regex": "x", "after_reasoning": ["◁think▷", "◁/think▷"]},
        {"choice": ["yes", "no", ""]},
        {"grammar": 'start: "a"'},
        {"json_object": True, "whitespace_pattern": r"[ \n]*"},
        {"structural_tag": '{"type":"structural_tag","structures":[],"triggers":[]}'},
    ],
)
def test_every_constraint_crosses_the_wire(fields):
    spec = StructuredOutputs(**fields)
    assert decode(encode(spec), StructuredOutputs) == spec
    assert spec.constraint in fields


def test_a_schema_given_as_a_dict_becomes_its_text_in_the_order_of_the_dict():
    schema = {"properties": {"é": {"type": "string"}, "a": {"const": 1}}}
    spec = StructuredOutputs(json=schema)
    assert isinstance(spec.json, str)
    assert list(json.loads(spec.json)["properties"]) == ["é", "a"]
    assert spec == StructuredOutputs(json=spec.json)
