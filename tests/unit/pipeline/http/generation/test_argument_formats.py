"""Schemas of few bytes whose formats would have any size: the work on them ends at the largest size of a request."""

from __future__ import annotations

from typing import Any

import pytest

from ipc.errors import InvalidRequest
from ipc.structured_outputs import MAX_STRUCTURE_BYTES
from pipeline.http.generation.argument_formats import FormatBudget
from pipeline.http.generation.call_formats import CallFormats
from pipeline.http.parsing.native_forms import NATIVE_FORMS

SELF: dict[str, Any] = {"$ref": "#/$defs/A"}


def calls(family: str, parameters: dict[str, Any]) -> CallFormats:
    tool = {"name": "f", "parameters": parameters}
    return CallFormats(NATIVE_FORMS[family], [tool], follows_schemas=True, is_parallel=True)


@pytest.mark.parametrize("family", ["pythonic", "qwen3_coder"])
@pytest.mark.parametrize(
    "definition",
    [
        {"anyOf": [SELF] * 8},
        {"anyOf": [{"enum": [1] * 40_000}] * 50},
        {"anyOf": [{"type": "integer", "x": ["y"] * 20_000}] * 50},
        {"anyOf": [{"type": "integer"}] * 1_000, "description": "with all definitions in each"},
    ],
)
def test_a_definition_that_a_format_would_repeat_without_end_is_refused(
    family: str, definition: dict[str, Any]
) -> None:
    parameters = {"properties": {f"p{i}": SELF for i in range(30)}, "$defs": {"A": definition, "B": {"x": "y" * 999}}}
    with pytest.raises(InvalidRequest, match="tools has parameters whose grammar would have more than 262,144 bytes"):
        calls(family, parameters)


def test_optional_arguments_of_python_calls_are_refused_before_all_their_orders_are_written() -> None:
    properties = {f"p{i}": {"type": "boolean"} for i in range(3_000)}
    with pytest.raises(InvalidRequest, match="fewer optional ones"):
        calls("pythonic", {"properties": properties})
    calls("pythonic", {"properties": properties, "required": list(properties)})


def test_the_tools_of_a_request_share_one_budget() -> None:
    tool = {"name": "f", "parameters": {"properties": {"a": {"enum": ["x" * 1_000]}}}}
    CallFormats(NATIVE_FORMS["pythonic"], [tool] * 200, follows_schemas=True, is_parallel=True)
    with pytest.raises(InvalidRequest):
        CallFormats(NATIVE_FORMS["pythonic"], [tool] * 300, follows_schemas=True, is_parallel=True)


def test_a_budget_holds_as_many_bytes_as_a_request_may_have() -> None:
    budget = FormatBudget()
    budget.spend(MAX_STRUCTURE_BYTES)
    with pytest.raises(InvalidRequest):
        budget.spend(1)
