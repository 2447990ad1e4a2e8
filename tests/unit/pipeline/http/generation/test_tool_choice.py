"""What the fields of a request about tools and answer formats ask of the answer, and which of them are refused."""

from __future__ import annotations

import contextlib
import json
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipc.errors import InvalidRequest
from pipeline.http.errors import http_error
from pipeline.http.generation.tool_choice import Constraint, constrain
from pipeline.http.generation.tool_definitions import parameters_of
from pipeline.http.parsing.families import REASONING_TAGS
from pipeline.http.parsing.formats import OutputFormat
from tests.unit.workers.grammar.grammar_tools import accepts, compiled

SCHEMA: Final = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
JSON_SCHEMA: Final = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}


def tool(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


KEYWORDS: Final = [
    "type", "properties", "required", "enum", "const", "anyOf", "allOf", "oneOf", "items", "$ref", "$defs", "a",
    "pattern", "minLength", "maxLength", "additionalProperties", "nullable", "description",
]  # fmt: skip
BAD_FORMAT: Final = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "foo"}}}
TOOLS: Final = [tool("f", parameters=SCHEMA), tool("g")]
STRICT: Final = [tool("f", parameters=SCHEMA, strict=True), tool("g")]


def constrained(family: str | None = "hermes", **fields: Any) -> Constraint:
    given: dict[str, Any] = {
        "tools": None, "tool_choice": None, "parallel_tool_calls": None, "response_format": None,
        "structured_outputs": None, "format": OutputFormat(tool_parser=family), "starts_in_reasoning": False,
    }  # fmt: skip
    return constrain(**given | fields)


@pytest.mark.parametrize(
    ("fields", "call_form", "tools"),
    [
        ({}, "none", []),
        ({"tools": [], "tool_choice": "auto"}, "none", []),
        ({"tools": STRICT, "tool_choice": "none"}, "none", []),
        ({"tools": TOOLS}, "native", ["f", "g"]),
        ({"tools": TOOLS, "tool_choice": "auto", "parallel_tool_calls": True}, "native", ["f", "g"]),
        ({"tools": TOOLS, "response_format": {"type": "text"}}, "native", ["f", "g"]),
        ({"tools": TOOLS, "structured_outputs": {"regex": None}}, "native", ["f", "g"]),
    ],
)
def test_nothing_is_constrained_where_nothing_is_asked(fields: Any, call_form: str, tools: list[str]) -> None:
    constraint = constrained(**fields)
    assert constraint.structured is None
    assert constraint.call_form == call_form
    assert [each["name"] for each in constraint.tools] == tools


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"tool_choice": "required"}, "tools: the parameters of 'bad'"),
        ({"family": "pythonic", "tool_choice": "required"}, "tools: the parameters of 'bad'"),
        ({"family": "qwen3_coder", "tool_choice": "required"}, "tools: the parameters of 'bad'"),
        ({"tool_choice": "auto"}, "tools: the parameters of 'bad'"),
        ({"family": None, "tool_choice": named("bad")}, "tools: the parameters of 'bad'"),
        ({"family": None, "tool_choice": "auto"}, "tools: the parameters of 'bad'"),
        ({"response_format": BAD_FORMAT}, "structured_outputs.json"),
        ({"family": None, "response_format": BAD_FORMAT}, "tools"),
        ({"family": "harmony", "tools": None, "response_format": BAD_FORMAT}, "structured_outputs.json"),
    ],
    ids=str,
)
def test_an_error_of_a_schema_names_the_tool_or_field_that_has_it(fields: dict[str, Any], name: str) -> None:
    broken = {"type": "object", "properties": {"a": {"type": "foo"}}, "required": ["a"]}
    parameters = SCHEMA if fields.get("response_format") else broken
    tools = [tool("good", parameters=SCHEMA, strict=True), tool("bad", parameters=parameters, strict=True)]
    spec = constrained(**{"tools": tools, **fields}).structured
    assert spec is not None
    with pytest.raises(InvalidRequest) as refused:
        compiled(spec)
    assert str(refused.value).startswith(f"{name} cannot be used: ")
    assert "foo" in str(refused.value)


def nested(width: int, key: str) -> dict[str, Any]:
    """A small schema that stands for width ** 8 values."""
    definitions = {f"d{i}": {key: [{"$ref": f"#/$defs/d{i + 1}"}] * width} for i in range(9)}
    properties = {"a": {"$ref": "#/$defs/d0"}}
    return {"type": "object", "$defs": {**definitions, "d9": {"type": "integer"}}, "properties": properties}


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        ({"response_format": JSON_SCHEMA}, ['{"a": 1}'], ["{}", "text"]),
        ({"response_format": {"type": "json_object"}}, ["{}"], ["[]"]),
        ({"structured_outputs": {"choice": ["x", "xy"], "disable_fallback": True}}, ["x", "xy"], ["y"]),
        ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}, ['{"a":1}'], ['{"a": 1}']),
        ({"tools": STRICT, "tool_choice": "none", "response_format": JSON_SCHEMA}, ['{"a": 1}'], ["{}"]),
        (
            {"response_format": {"type": "structural_tag", "format": {"type": "const_string", "value": "x"}}},
            ["x"], ["y"],
        ),
    ],
)  # fmt: skip
def test_an_answer_format_is_a_grammar(fields: Any, good: list[str], bad: list[str]) -> None:
    constraint = constrained(**fields)
    assert constraint.call_form == "none"
    assert constraint.structured is not None
    assert [text for text in good if not accepts(constraint.structured, text)] == []
    assert [text for text in bad if accepts(constraint.structured, text)] == []


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        # Tools that are not strict may have any arguments, but those that are required follow their schema.
        ({"tools": STRICT}, ["", "x", call("g", '{"b": 1}'), call("f", '{"a": 1}')], [call("f", '{"b": 1}')]),
        ({"tools": TOOLS, "tool_choice": "required"}, [call("g", "{}")], ["x", call("g", '{"b": 1}')]),
        # Only one call, or only some tools.
        (
            {"tools": TOOLS, "parallel_tool_calls": False},
            ["x", "x" + call("f", '{"b": 1}')],
            [call("f", "{}") + call("g", "{}"), call("f", "{}") + "x"],
        ),
        (
            {"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [
                {"type": "function", "name": "g"}]}},
            ["x", call("g", '{"b": 1}')], [call("f", '{"a": 1}')],
        ),
        (
            {"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": {
                "mode": "required", "tools": [named("f")]}}},
            [call("f", '{"a": 1}')], [call("g", "{}"), "x"],
        ),
        # An answer format: calls or JSON. A required call stands alone.
        ({"tools": TOOLS, "response_format": JSON_SCHEMA}, ['{"a": 1}', call("g", "{}")], ["x", '{"a": "1"}']),
        ({"tools": TOOLS, "structured_outputs": {"choice": ["x", "xy"]}}, ["xy", call("g", "{}")], ["y"]),
        (
            {"tools": TOOLS, "tool_choice": named("f"), "response_format": JSON_SCHEMA},
            [call("f", '{"a": 1}')], ['{"a": 1}'],
        ),
    ],
)  # fmt: skip
def test_calls_are_constrained_as_far_as_the_request_asks(fields: Any, good: list[str], bad: list[str]) -> None:
    constraint = constrained(**fields)
    assert constraint.call_form == "native"
    assert constraint.structured is not None
    assert [text for text in good if not accepts(constraint.structured, text)] == []
    assert [text for text in bad if accepts(constraint.structured, text)] == []


def test_a_form_that_only_the_model_s_files_know_has_a_grammar_where_a_call_is_required() -> None:
    forms = {"required": "json_list", "auto": "native"}
    for tool_choice, call_form in forms.items():
        constraint = constrained("response_template", tools=STRICT, tool_choice=tool_choice)
        assert constraint.call_form == call_form
        assert (constraint.structured is None) is (tool_choice == "auto")


def test_a_structural_tag_of_the_request_holds_as_it_is_beside_tools() -> None:
    tag = {"type": "structural_tag", "format": {"type": "const_string", "value": "x"}}
    for fields in ({"response_format": tag}, {"structured_outputs": {"structural_tag": tag}}):
        constraint = constrained(tools=STRICT, **fields)
        assert constraint.structured is not None
        assert json.loads(constraint.structured.structural_tag or "") == tag
        assert constraint.call_form == "native"


@pytest.mark.parametrize(
    ("reasoning", "starts", "tags"),
    [
        (None, False, []),
        ("think", False, ["<think>", "</think>"]),
        ("think", True, ["</think>"]),
        ("deepseek_r1", False, ["</think>"]),  # its text may begin inside the reasoning in any case
    ],
)
def test_every_grammar_holds_behind_the_reasoning(reasoning: str | None, starts: bool, tags: list[str]) -> None:
    format = OutputFormat(
        tool_parser="hermes", reasoning_parser=reasoning, reasoning_tags=REASONING_TAGS.get(reasoning or "")
    )
    for fields in (
        {"response_format": JSON_SCHEMA}, {"tools": STRICT}, {"tools": TOOLS, "tool_choice": "required"},
        {"tools": TOOLS, "tool_choice": named("g")}, {"structured_outputs": {"regex": "a"}},
    ):  # fmt: skip
        constraint = constrained(format=format, starts_in_reasoning=starts, **fields)
        assert constraint.structured is not None
        assert constraint.structured.after_reasoning == tags
    own = constrained(format=format, structured_outputs={"regex": "a", "after_reasoning": ["x"]})
    assert own.structured is not None
    assert own.structured.after_reasoning == ["x"], "the request's own tags win"


@pytest.mark.parametrize(
    ("fields", "param", "problem"),
    [
        ({"tools": "f"}, "tools", "tools ('f') must be a list of tools"),
        ({"tools": [5]}, "tools", "tools[0] (5) must be an object"),
        ({"tools": [{"type": "web_search"}]}, "tools", "tools[0].type ('web_search') must be 'function'"),
        ({"tools": [{"type": "function"}]}, "tools", "tools[0].function (None) must be an object with a name"),
        ({"tools": [*TOOLS, tool("a b")]}, "tools", "tools[2].function.name ('a b') must be 1 to 128 letters, digits"),
        ({"tools": [tool("x" * 129)]}, "tools", "tools[0].function.name ('xxx"),
        ({"tools": [tool("f", parameters=[])]}, "tools", "tools[0].function.parameters ([]) must be an object with a"),
        ({"tools": [tool("f", parameters={"type": "array"})]}, "tools", "tools[0].function.parameters.type ('array')"),
        ({"tools": [tool("f", strict=1)]}, "tools", "tools[0].function.strict (1) must be true or false"),
        ({"tools": [tool("f"), tool("f")]}, "tools", "tools[1].function.name ('f') is the name of tools[0] too"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", "tool_choice ('any') must be 'auto', 'none'"),
        ({"tool_choice": "required"}, "tool_choice", "tool_choice ('required') needs a tool"),
        ({"tool_choice": named("f")}, "tool_choice", "tool_choice.function.name ('f') must name one of the tools: the"),
        (
            {"tools": TOOLS, "tool_choice": named("h")},
            "tool_choice", "tool_choice.function.name ('h') must name one of the tools: the tools are 'f', 'g'",
        ),
        ({"tools": TOOLS, "tool_choice": {"type": "mcp"}}, "tool_choice", "tool_choice.type ('mcp') must be"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}},
            "tool_choice", "tool_choice.allowed_tools.tools ([]) must be a list of at least one function",
        ),
        (
            {"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [named("h")]}},
            "tool_choice", "tool_choice.allowed_tools.tools[0].function.name ('h') must name one of the tools",
        ),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls", "parallel_tool_calls (1) must be true or false"),
        ({"response_format": "json"}, "response_format", "response_format ('json') must be 'text', 'json_object'"),
        ({"response_format": {"type": "xml"}}, "response_format", "response_format.type ('xml') must be 'text'"),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format", "response_format.json_schema (None) must be an object with a name and a schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
            "response_format", "response_format.json_schema.schema (None) must be an object with a JSON schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n n", "schema": {}}}},
            "response_format", "response_format.json_schema.name ('n n') must be 1 to 128",
        ),
        (
            {"response_format": JSON_SCHEMA, "structured_outputs": {"regex": "a"}},
            "structured_outputs", "structured_outputs (with regex) and response_format (of type 'json_schema') are",
        ),
        (
            {"tools": TOOLS, "tool_choice": "required", "structured_outputs": {"regex": "a"}},
            "structured_outputs", "structured_outputs (with regex) cannot be honoured beside tool_choice ('required')",
        ),
        ({"structured_outputs": []}, "structured_outputs", "structured_outputs ([]) must be an object"),
        ({"structured_outputs": {"rege": "a"}}, "structured_outputs", "structured_outputs has a field 'rege': its"),
        ({"structured_outputs": {"": "a"}}, "structured_outputs", "structured_outputs has a field '': its"),
        (
            {"structured_outputs": {"regex": "a", "choice": ["b"]}},
            "structured_outputs", "structured_outputs must have exactly one of json, regex",
        ),
    ],
)  # fmt: skip
def test_a_request_that_contradicts_itself_is_refused_with_the_field_s_name(
    fields: Any, param: str, problem: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        constrained(**fields)
    assert str(caught.value).startswith(problem)
    assert "\n" not in str(caught.value)
    error = http_error(caught.value)
    assert error is not None
    assert (error.status, error.param) == (400, param)


def test_grammars_leave_out_the_descriptions_of_a_schema_but_no_property_of_that_name() -> None:
    schema = {
        "title": "T", "description": "d", "required": ["description"], "$defs": {"title": {"const": {"title": 1}}},
        "properties": {"description": {"type": "string", "description": "d", "default": "x"}, "title": {"anyOf": [
            {"$ref": "#/$defs/title", "description": "d"}, {"type": "null", "title": "N"}]}},
    }  # fmt: skip
    assert parameters_of({"name": "f", "parameters": schema}) == {
        "type": "object", "required": ["description"], "$defs": {"title": {"const": {"title": 1}}},
        "properties": {"description": {"type": "string"}, "title": {"anyOf": [
            {"$ref": "#/$defs/title"}, {"type": "null"}]}},
    }  # fmt: skip


def test_an_answer_format_of_harmony_holds_in_the_channel_of_the_answer() -> None:
    format = OutputFormat(tool_parser="harmony", reasoning_parser="harmony")
    constraint = constrained(format=format, response_format=JSON_SCHEMA)
    assert constraint.structured is not None
    answer = '<|channel|>final<|message|>{"a": 1}'
    assert accepts(constraint.structured, answer)
    reasoning = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    assert accepts(constraint.structured, reasoning + answer, spelled_out=True)  # <|end|> ends the tiny model's texts
    assert not accepts(constraint.structured, '{"a": 1}')
    assert not accepts(constraint.structured, "<|channel|>final<|message|>text")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_schema_that_is_none_is_refused_and_never_an_error_of_ours(data: st.DataObject) -> None:
    values = st.recursive(
        st.none() | st.booleans() | st.integers(-2, 9) | st.sampled_from(["string", "#/$defs/a", "^a$", "[", "é\n"]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYWORDS), inner, max_size=4),
        max_leaves=12,
    )
    schema = data.draw(st.dictionaries(st.sampled_from(KEYWORDS), values, max_size=5))
    family = data.draw(st.sampled_from(["hermes", "glm45", "pythonic", "llama3_json", None]))
    choice = data.draw(st.sampled_from(["auto", "required", named("f")]))
    answer = data.draw(st.sampled_from([None, {"type": "json_object"}]))
    tools = [tool("f", parameters=schema, strict=True)]
    with contextlib.suppress(InvalidRequest):
        constraint = constrained(family, tools=tools, tool_choice=choice, response_format=answer)
        assert constraint.structured is not None


def test_parameters_that_are_nested_too_deeply_are_refused() -> None:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(2_000):
        schema = {"type": "object", "properties": {"a": schema}}
    for family in ("hermes", "glm45", "pythonic", None):
        with pytest.raises(InvalidRequest, match="nested too deeply"):
            constrained(family, tools=[tool("f", parameters=schema)], tool_choice="required")
