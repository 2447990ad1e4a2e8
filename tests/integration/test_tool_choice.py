"""Tool calls that a request requires, in a running engine: the small model knows no tools, and its calls are valid."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import jsonschema
import pytest

from pipeline import Chat, Client, Pipeline, SamplingParams, StructuredOutputs
from pipeline.http.generation.events import ToolArguments, ToolCallBegin
from pipeline.http.generation.tool_choice import Constraint, constrain, messages_for
from pipeline.http.parsing.formats import OutputFormat
from tests.integration.conftest import TINY_CONFIG

pytestmark = pytest.mark.slow

WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 9},
            "unit": {"$ref": "#/$defs/Unit"},
            "days": {"type": "integer", "minimum": 1, "maximum": 7},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
        "$defs": {"Unit": {"enum": ["c", "f"]}},
    },
}
CLOCK = {"name": "now"}
TOOLS = [{"type": "function", "function": each} for each in (WEATHER, CLOCK)]
NAMED = {"type": "function", "function": {"name": "get_weather"}}
MESSAGES = [{"role": "user", "content": "What is the weather in Rio?"}]


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with Pipeline(TINY_CONFIG, ["scheduler.max_model_len=1024"]) as pipeline:
        yield pipeline.client


def calls_in(text: str, constraint: Constraint, format: OutputFormat) -> list[tuple[str, Any]]:
    """The calls in a text that consists of calls."""
    parser = format.parser(reads_calls=constraint.call_form, tools=constraint.tools, starts_in_reasoning=False)
    calls: list[tuple[str, str]] = []
    for event in [*parser.push(text), *parser.finish()]:
        assert isinstance(event, ToolCallBegin | ToolArguments), f"{text!r} holds text"
        calls = (
            [*calls, (event.name, "")]
            if isinstance(event, ToolCallBegin)
            else [*calls[:-1], (calls[-1][0], calls[-1][1] + event.text)]
        )
    return [(name, json.loads(arguments)) for name, arguments in calls]


def check_calls(calls: Sequence[tuple[str, Any]]) -> None:
    assert calls
    for name, arguments in calls:
        parameters: Any = {"get_weather": WEATHER["parameters"], "now": {"maxProperties": 0}}[name]
        jsonschema.validate(arguments, parameters)


@pytest.mark.parametrize("tool_choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize("family", [None, "hermes", "pythonic", "glm45"])
def test_calls_are_valid_at_any_temperature(client: Client, family: str | None, tool_choice: Any) -> None:
    format = OutputFormat(tool_parser=family)
    constraint = constrain(
        tools=TOOLS, tool_choice=tool_choice, parallel_tool_calls=tool_choice != "required", response_format=None,
        structured_outputs=None, format=format, starts_in_reasoning=False,
    )  # fmt: skip
    chat = Chat(messages_for(MESSAGES, TOOLS, template_reads_tools=False))
    params = [
        SamplingParams(
            max_tokens=200, temperature=float(seed > 0), seed=seed, structured_outputs=constraint.structured
        )
        for seed in range(4)
    ]  # fmt: skip
    num_complete = 0
    for output in client.generate_batch([chat] * len(params), params):
        if output.finish_reason == "stop":
            num_complete += 1
            calls = calls_in(output.text, constraint, format)
            check_calls(calls)
            assert len(calls) == 1
            assert tool_choice == "required" or calls[0][0] == "get_weather"
        else:
            assert output.finish_reason == "length", output.error
    assert num_complete >= 3, "too few calls are complete to prove anything"


def test_a_schema_holds_behind_a_reasoning_only(client: Client) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    spec = StructuredOutputs(json=schema, disable_any_whitespace=True, after_reasoning=["."])
    params = [
        SamplingParams(max_tokens=200, temperature=float(seed > 0), seed=seed, structured_outputs=spec)
        for seed in range(8)
    ]
    answers = [output for output in client.generate_batch(["A list is"] * 8, params) if output.finish_reason == "stop"]
    assert len(answers) >= 4
    for output in answers:
        reasoning, _, answer = output.text.partition(".")
        assert "{" not in reasoning[:1]
        assert json.loads(answer)["a"] in (1, 2)
    assert any(len(output.text.partition(".")[0]) > 5 for output in answers), "no answer had a reasoning"
