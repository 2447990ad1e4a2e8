"""Grammars of tool calls against the parsers: what a family's grammar allows, its parser reads as the same calls."""

from __future__ import annotations

import json
from functools import cache
from typing import Any, Final

import jsonschema
import pytest
from tokenizers import AddedToken, Tokenizer

from ipc.structured_outputs import StructuredOutputs
from pipeline.http.generation.events import Content, Reasoning, ToolArguments, ToolCallBegin
from pipeline.http.generation.tool_choice import Constraint, constrain
from pipeline.http.parsing.families import HARMONY, REASONING_TAGS
from pipeline.http.parsing.formats import OutputFormat
from pipeline.http.parsing.native_forms import NATIVE_FORMS
from tests.unit.workers.grammar.grammar_tools import TINY, accepts, walk
from workers.grammar.compiler import Compiler
from workers.grammar.matchers import Matchers
from workers.grammar.vocabulary import Vocabulary

PLACE: Final = {
    "name": "get.place-1",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "enum": ["Rio", "Łódź"]},
            "kind": {"$ref": "#/$defs/Kind"},
            "days": {"type": "integer", "minimum": 0, "maximum": 20},
            "exact": {"type": "boolean"},
            "places": {"type": "array", "items": {"anyOf": [{"type": "boolean"}, {"type": "null"}]}, "maxItems": 2},
        },
        "required": ["name", "days"],
        "additionalProperties": False,
        "$defs": {"Kind": {"enum": ["a", "b"]}},
    },
}
NOW: Final = {"name": "now", "strict": True}
TOOLS: Final = [{"type": "function", "function": each} for each in (PLACE, NOW)]
CALLS: Final = [("get.place-1", {"name": "Łódź", "days": 3, "exact": True}), ("now", {})]
FAMILIES: Final = [*NATIVE_FORMS, None]
FAST: Final = ("hermes", "pythonic", "glm45", HARMONY, None)  # one of each kind of form


def families(*fast: str | None, among: Any = FAMILIES) -> list[Any]:
    """The families as parameters of a test, of which only some are not slow."""
    return [pytest.param(each, marks=() if each in fast else pytest.mark.slow) for each in among]


NAMED: Final = {"type": "function", "function": {"name": "get.place-1"}}


def format_of(family: str | None, **options: Any) -> OutputFormat:
    return OutputFormat(tool_parser=family, **options)


def constrained(
    family: str | None, tool_choice: Any, tools: Any = TOOLS, starts_in_reasoning: bool = False, **options: Any
) -> Constraint:
    fields = {
        "parallel_tool_calls": None, "response_format": None, "structured_outputs": None, "format": format_of(family),
    }  # fmt: skip
    return constrain(
        tools=tools, tool_choice=tool_choice, starts_in_reasoning=starts_in_reasoning, **{**fields, **options}
    )


def grammar_of(constraint: Constraint) -> StructuredOutputs:
    assert constraint.structured is not None
    return constraint.structured


def read(constraint: Constraint, format: OutputFormat, text: str, starts: bool = False) -> tuple[list[Any], str, str]:
    """The calls in a text, with the values of their arguments; the rest of the answer; and the reasoning."""
    parser = format.parser(reads_calls=constraint.call_form, tools=constraint.tools, starts_in_reasoning=starts)
    calls: list[tuple[str, str]] = []
    content = reasoning = ""
    for event in [*parser.push(text), *parser.finish()]:
        if isinstance(event, ToolCallBegin):
            calls.append((event.name, ""))
        elif isinstance(event, ToolArguments):
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
        elif isinstance(event, Content):
            content += event.text
        else:
            assert isinstance(event, Reasoning)
            reasoning += event.text
    return [(name, json.loads(arguments)) for name, arguments in calls], content, reasoning


def written(family: str | None, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """Calls as a model of the family writes them."""
    form = NATIVE_FORMS.get(family or "")
    if form is None:
        return json.dumps([{"name": name, "parameters": arguments} for name, arguments in calls], ensure_ascii=False)
    texts = []
    for i, (name, arguments) in enumerate(calls):
        if form.arguments == "python":
            text = ", ".join(f"{key}={literal(value)}" for key, value in arguments.items())
        elif form.xml is not None:
            text = "".join(
                f"{form.xml.key_begin}{key}{form.xml.key_end}{form.xml.value_begin}"
                f"{value if isinstance(value, str) else json.dumps(value)}{form.xml.value_end}"
                for key, value in arguments.items()
            )
        else:
            text = json.dumps(arguments, ensure_ascii=False)
        texts.append(form.example(name, text, index=i))
    whole = form.section_begin + form.separator.join(texts) + form.section_end
    return whole.removesuffix("<|call|>")  # ends the sequence


def literal(value: Any) -> str:
    """A value in Python, with double quotes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(key)}: {literal(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(literal, value))}]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def is_valid(name: str, arguments: Any) -> bool:
    tools = {each["name"]: each.get("parameters", {"maxProperties": 0}) for each in (PLACE, NOW)}
    return bool(jsonschema.Draft202012Validator(tools[name]).is_valid(arguments))


@pytest.mark.parametrize("family", families(*FAST))
def test_a_required_call_is_written_in_the_family_s_form_and_read_back(family: str | None) -> None:
    constraint, format = constrained(family, "required"), format_of(family)
    assert constraint.call_form == ("json_list" if family is None else "native")
    spec = grammar_of(constraint)
    parallel = family != HARMONY
    for calls in (CALLS[:1], CALLS[1:], CALLS, CALLS + CALLS[:1]):
        text = written(family, calls)
        assert accepts(spec, text) is (len(calls) == 1 or parallel)
        assert read(constraint, format, text) == (calls, "", "")
    one = grammar_of(constrained(family, "required", parallel_tool_calls=False))
    assert accepts(one, written(family, CALLS[:1]))
    assert not accepts(one, written(family, CALLS))
    for wrong in ([("then", {})], [("now", {"a": 1})], [("get.place-1", {"name": "Oslo", "days": 3})], []):
        assert not accepts(spec, written(family, wrong))
    assert not accepts(spec, "Hello")
    assert not accepts(spec, "Hello " + written(family, CALLS[:1]))


@pytest.mark.parametrize("family", families(*FAST))
def test_a_named_call_is_one_call_of_that_function(family: str | None) -> None:
    constraint, format = constrained(family, NAMED), format_of(family)
    spec, calls = grammar_of(constraint), CALLS[:1]
    text = json.dumps(calls[0][1], ensure_ascii=False) if family is None else written(family, calls)
    assert constraint.call_form == ("json_arguments" if family is None else "native")
    assert accepts(spec, text)
    assert read(constraint, format, text) == (calls, "", "")
    assert not accepts(spec, written(family, CALLS[1:]))
    assert not accepts(spec, written(family, CALLS[:1] * 2))


@pytest.mark.parametrize("tool_choice", ["required", NAMED, "auto"], ids=["required", "named", "auto"])
@pytest.mark.parametrize("family", families("pythonic"))
def test_whatever_a_grammar_allows_is_read_as_valid_calls_or_as_text(family: str | None, tool_choice: Any) -> None:
    """Random texts. Most texts of "auto" are free, so an answer format leaves calls as the only other choice there."""
    format_given = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": "free"}}}
    constraint = constrained(
        family, tool_choice, response_format=format_given if tool_choice == "auto" else None,
        format=format_of(family),
    )  # fmt: skip
    spec = StructuredOutputs(structural_tag=constraint.structured.structural_tag, json=constraint.structured.json,
                             disable_any_whitespace=True)  # fmt: skip
    num_calls = 0
    for seed in range(8):
        text, has_ended = walk(spec, seed, max_tokens=200)
        if has_ended:
            calls, content, reasoning = read(constraint, format_of(family), text)
            assert [call for call in calls if not is_valid(*call)] == [], text
            assert reasoning == ""
            assert content in ("", '"free"')
            assert (content == "") is bool(calls)
            num_calls += len(calls)
    assert num_calls > 0


DEFINITIONS: Final = {
    "Object": {"type": "object", "properties": {"k": {"type": "string"}}, "required": ["k"]},
    "Colour": {"enum": ["r", "g"]},
    "Number": {"type": "integer"},
    "Tree": {"type": "object", "properties": {"c": {"$ref": "#/$defs/Tree"}}},
}
OBJECTS: Final = {
    "type": "array", "items": {
        "type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": "string"}}, "required": ["a"],
    },
}  # fmt: skip
# Schemas of one argument, values that they allow, and values that they do not.
ARGUMENTS: Final[list[tuple[dict[str, Any], list[Any], list[Any]]]] = [
    ({"$ref": "#/$defs/Object"}, [{"k": "x"}], [{"j": 1}]),
    ({"$ref": "#/$defs/Colour"}, ["r"], ["z"]),
    ({"$ref": "#/$defs/Number"}, [5], ["x"]),
    ({"$ref": "#/$defs/Tree"}, [{"c": {"c": {}}}], [{"c": 1}]),
    ({"allOf": [{"$ref": "#/$defs/Colour"}], "title": "T"}, ["r"], ["z"]),
    ({"anyOf": [{"$ref": "#/$defs/Colour"}, {"type": "null"}]}, ["r", None], ["z"]),
    ({"anyOf": [{"$ref": "#/$defs/Object"}, {"type": "null"}]}, [{"k": "x"}, None], [{"j": 1}]),
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, ["hello there", None], []),
    ({"type": ["string", "null"]}, ["null x", None], []),
    ({"type": ["integer", "null"]}, [3, None], ["x"]),
    ({"anyOf": [{"type": "integer"}, {"type": "number"}]}, [3, 2.5], ["x"]),
    ({"enum": ["a", 1, None, True]}, ["a", 1, None, True], ["b"]),
    ({"const": "only"}, ["only"], ["b"]),
    ({"type": "number"}, [1.5, -2], ["x"]),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ["abc", "ab", "a<b"], ["abcd", "a", ""]),
    ({"type": "string", "pattern": "^a+/$"}, ["aaa/"], ["b", "a", "a/a"]),
    ({"type": "string", "pattern": "b|d", "maxLength": 4}, ["abc"], ["c", "abcde"]),
    ({"type": "string"}, ['line\nbreak "q" \\ é 日', "  x ", "<b>", ""], []),
    (OBJECTS, [[], [{"a": True}, {"a": False, "b": "x"}]], [[{"b": "x"}]]),
    ({"type": "array", "items": {"type": "integer"}, "minItems": 1}, [[1]], [[]]),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, [{"x": 1}, {}], [{"x": "y"}]),
    ({"type": "object"}, [{"x": [1, {"y": "z"}]}], []),
    ({}, ["x"], []),
]


@pytest.mark.parametrize("schema", ARGUMENTS, ids=lambda case: json.dumps(case[0])[:40])
@pytest.mark.parametrize(
    "family", families("glm45", among=["hermes", "qwen3_coder", "minimax_m2", "glm45", "pythonic"])
)
def test_an_argument_of_every_kind_follows_its_schema_and_is_read_back(family: str, schema: Any) -> None:
    argument, good, bad = schema
    parameters = {
        "type": "object", "properties": {"v": argument, "o": {"type": "boolean"}}, "required": ["v"],
        "additionalProperties": False, "$defs": DEFINITIONS,
    }  # fmt: skip
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    constraint, format = constrained(family, "required", tools=[tool]), format_of(family)
    for value in [*good, *bad]:
        for arguments in ({"v": value}, {"v": value, "o": True}):
            text = written(family, [("f", arguments)])
            assert accepts(grammar_of(constraint), text) is any(value is each for each in good), text
            if any(value is each for each in good):
                assert read(constraint, format, text) == ([("f", arguments)], "", "")


@pytest.mark.parametrize("family", families(*FAST))
def test_calls_of_strict_tools_follow_their_schemas_in_the_midst_of_free_text(family: str | None) -> None:
    constraint, format = constrained(family, "auto"), format_of(family)
    spec, text = grammar_of(constraint), "What { a [day] < it is"
    has_marker = family is not None and NATIVE_FORMS[family].trigger != "" and family != HARMONY
    final = "<|channel|>final<|message|>" if family == HARMONY else ""
    calls = CALLS[:1]
    call = written(family, calls) if family else '{"name": "get.place-1", "parameters": {"name": "Rio", "days": 1}}'
    calls = calls if family else [("get.place-1", {"name": "Rio", "days": 1})]
    assert accepts(spec, call)
    assert read(constraint, format, call) == (calls, "", "")
    assert accepts(spec, final + text)
    assert read(constraint, format, final + text) == ([], text, "")
    if family != HARMONY:
        assert accepts(spec, text + call)
        assert read(constraint, format, text + call) == ((calls, text, "") if has_marker else ([], text + call, ""))
    assert not accepts(spec, call.replace("Rio", "Oslo").replace("Łódź", "Oslo"))
    assert not accepts(spec, call.replace("get.place-1", "then"))
    if has_marker:
        assert not accepts(spec, text + call.replace("get.place-1", "then"))


def test_a_call_without_the_outer_tag_is_bound_too_where_the_parser_reads_it() -> None:
    spec = grammar_of(constrained("qwen3_coder", "auto"))
    bare = written("qwen3_coder", CALLS[:1]).removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
    assert accepts(spec, "Text " + bare)
    assert not accepts(spec, "Text " + bare.replace("Łódź", "Oslo"))


@pytest.mark.parametrize("family", [None, "llama3_json", "pythonic"])
def test_without_a_marker_a_text_that_reads_as_no_call_is_free(family: str | None) -> None:
    constraint = constrained(family, "auto")
    for text in ("", "{", '{"a": 1}', "[1, 2]", "[now]", " [x] = now()", "[]"):
        assert accepts(grammar_of(constraint), text)
        assert read(constraint, format_of(family), text) == ([], text, "")
    for call in {"pythonic": ["[then()]", " [then(a=1"]}.get(family or "", ['{"name": "then"', ' {"parameters": {}']):
        assert not accepts(grammar_of(constraint), call)


@pytest.mark.parametrize("family", families(*FAST, "llama3_json"))
def test_an_answer_format_under_auto_lets_the_model_choose_between_calls_and_that_format(family: str | None) -> None:
    schema = {
        "type": "object", "properties": {"name": {"$ref": "#/$defs/N"}}, "required": ["name"],
        "$defs": {"N": {"type": "string"}}, "additionalProperties": False,
    }  # fmt: skip
    answer = '{"name": "Ann"}'
    constraint = constrained(
        family, "auto", response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    )
    final = "<|channel|>final<|message|>" if family == HARMONY else ""
    assert accepts(grammar_of(constraint), final + answer)
    assert read(constraint, format_of(family), final + answer) == ([], answer, "")
    assert not accepts(grammar_of(constraint), final + answer.replace("name", "game"))
    assert not accepts(grammar_of(constraint), "text")
    call = written(family, CALLS[:1]).removeprefix("[") if family is None else written(family, CALLS[:1])
    call = call.removesuffix("]") if family is None else call
    assert accepts(grammar_of(constraint), call)
    assert read(constraint, format_of(family), call) == (CALLS[:1], "", "")


# ---- with the families' markers as special tokens, and behind a reasoning

MARKERS: Final = sorted(
    {"<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|constrain|>", "[TOOL_CALLS]", "[ARGS]"}
    | {"<tool_call>", "</tool_call>", "<think>", "</think>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"}
    | {"<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<|tool_calls_section_begin|>"}
    | {"<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>", "<|tool_call_argument_begin|>"}
    | {"<|tool_call|>", "<|tool_call_start|>", "<|tool_call_end|>"}
)


@cache
def with_markers() -> tuple[Tokenizer, Vocabulary]:
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in [*MARKERS, "<|call|>"]])
    return tokenizer, Vocabulary(tokenizer, tokenizer.get_vocab_size(), tokenizer.token_to_id("<|call|>"))


@pytest.mark.parametrize("starts", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("family", families("hermes", "deepseek_v3", HARMONY))
def test_a_call_may_follow_a_reasoning_with_special_tokens_as_markers(family: str | None, starts: bool) -> None:
    tokenizer, vocabulary = with_markers()
    if family == HARMONY:
        format = OutputFormat(tool_parser=HARMONY, reasoning_parser=HARMONY)
        begin, end = "<|channel|>analysis<|message|>", "<|end|><|start|>assistant"
    else:
        begin, end = REASONING_TAGS["think"]
        format = format_of(family, reasoning_parser="think", reasoning_tags=(begin, end))
    constraint = constrained(family, "required", format=format, starts_in_reasoning=starts)
    prototype = Compiler(vocabulary).compile(grammar_of(constraint))
    ends = [vocabulary.end_id]
    answer = written(family, CALLS[:1])
    thought = f"Which {{tool}}? {end}"
    good = [thought + answer] if starts else [begin + thought + answer, answer]
    bad = [thought + "Hello", answer + "Hello", begin + answer] + ([answer] if starts else [thought + answer])
    for text in [*good, *bad]:
        matchers = Matchers(vocabulary)
        matchers.add(1, prototype, ends)
        for token_id in tokenizer.encode(text, add_special_tokens=False).ids:
            matchers.advance(1, token_id)
        assert matchers.is_complete(1) is (text in good), text
        if text in good:
            expected = thought.removesuffix(end) if text != answer else ""
            assert read(constraint, format, text, starts) == (CALLS[:1], "", expected)
