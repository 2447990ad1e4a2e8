"""Walks through grammars of every kind, and inputs that are broken or hostile."""

from __future__ import annotations

import json
import re
import resource
import time
from typing import Any, Final

import jsonschema
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ipc.errors import InvalidRequest
from ipc.structured_outputs import MAX_STRUCTURE_BYTES, StructuredOutputs
from tests.reference.json_schemas import SchemaGroup, schema_groups
from tests.unit.workers.grammar.grammar_tools import (
    END,
    accepts,
    allowed,
    compiled,
    masks_of,
    matchers_of,
    tokenizer,
    vocabulary,
    walk,
)
from workers.grammar.compiler import MAX_TOKEN_S, Compiler

PERSON: Final = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
# Instances that the suite calls valid and that are refused: another order of properties, another form of a number, or
# forms of addresses that the engine's formats do not know. Keywords beside a $ref count, also in draft 7.
NARROWER: Final = {
    "allOf.json", "const.json", "enum.json", "type.json", "ref.json", "optional/format/email.json",
    "optional/format/ipv6.json",
}  # fmt: skip
# Instances that the suite calls invalid and that are allowed: dates and leap seconds that only a calendar excludes.
WIDER: Final = {"optional/format/date-time.json", "optional/format/date.json", "optional/format/time.json"}


def schema_of(group: SchemaGroup) -> StructuredOutputs:
    return StructuredOutputs(json=group.schema)


def is_valid(schema: dict[str, Any], text: str) -> bool:
    validator: Any = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    return bool(validator(schema).is_valid(json.loads(text)))


def file_of(group: SchemaGroup) -> str:
    return group.file.partition("/")[2]


def test_texts_of_public_schemas_are_valid_when_they_end() -> None:
    num_ended = 0
    for seed, group in enumerate(schema_groups()):
        text, has_ended = walk(schema_of(group), seed, max_tokens=40)
        num_ended += has_ended
        assert not has_ended or is_valid(group.schema, text), f"{group.description}: {text}"
    assert num_ended > 0.9 * len(schema_groups()), "too few texts have ended to prove anything"


def test_public_schemas_allow_no_invalid_instance_and_most_valid_ones() -> None:
    refused: set[str] = set()
    allowed_although_invalid: set[str] = set()
    for group in schema_groups():
        for test in group.tests:
            is_allowed = accepts(schema_of(group), json.dumps(test["data"], ensure_ascii=False))
            if test["valid"] and not is_allowed:
                refused.add(file_of(group))
            if is_allowed and not test["valid"]:
                allowed_although_invalid.add(file_of(group))
    assert allowed_although_invalid <= WIDER
    assert refused <= NARROWER


@pytest.mark.parametrize("pattern", ["[a-f]{3}-[0-9]{2,4}", "^(yes|no|maybe)( please)?$", r"\w{1,3}/\d{1,2}", "a.b"])
def test_texts_of_a_regex_match_it(pattern: str) -> None:
    for seed in range(5):
        text, has_ended = walk(StructuredOutputs(regex=pattern), seed)
        assert has_ended
        assert re.search(f"^(?:{pattern})$", text), text


@given(
    choices=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8), min_size=1, max_size=5)
)
@hypothesis_settings(max_examples=20, deadline=None)
def test_texts_of_a_choice_are_exactly_its_strings(choices: list[str]) -> None:
    spec = StructuredOutputs(choice=choices)
    text, has_ended = walk(spec, len(choices))
    assert has_ended
    assert text in choices
    matchers = matchers_of(spec)
    for token_id in vocabulary().tokens.tokenize_str(choices[-1]):
        assert token_id in allowed(matchers)
        matchers.advance(1, token_id)
    assert END in allowed(matchers)


@pytest.mark.parametrize(
    ("pattern", "text"), [("a\nb", "a\nb"), (r"a\nb/\/", "a\nb//"), ('"\\\\?', '"\\'), ("[/#]+", "/#")]
)
def test_characters_that_mean_something_in_lark_mean_nothing_in_a_regex(pattern: str, text: str) -> None:
    assert accepts(StructuredOutputs(regex=pattern), text)


def test_any_json_object_is_an_object() -> None:
    texts = [walk(StructuredOutputs(json_object=True), seed) for seed in range(10)]
    ended = [text for text, has_ended in texts if has_ended]
    assert len(ended) >= 5
    assert all(isinstance(json.loads(text), dict) for text in ended)
    assert not accepts(StructuredOutputs(json_object=True), "[]")


@pytest.mark.parametrize(
    "grammar",
    [
        'start: sum\nsum: NUMBER | "(" sum OPERATOR sum ")"\nNUMBER: /[0-9]{1,3}/\nOPERATOR: /[+*-]/',
        'root ::= sum\nsum ::= number | "(" sum [+*-] sum ")"\nnumber ::= [0-9] [0-9]? [0-9]?',
    ],
    ids=["Lark", "GBNF"],
)
def test_texts_of_a_grammar_follow_it(grammar: str) -> None:
    spec = StructuredOutputs(grammar=grammar)
    for seed in range(5):
        text, has_ended = walk(spec, seed)
        if has_ended:
            assert re.fullmatch(r"[0-9+*()-]+", text)
            assert text.count("(") == text.count(")") == sum(text.count(each) for each in "+*-")
    assert accepts(spec, "(1+(22*333))")
    assert not accepts(spec, "(1+2")


@pytest.mark.parametrize(
    ("options", "texts", "others"),
    [
        ({}, ['{"a": 1}', '{"a":1}', '{\n    "a": 1\n}'], ['{"a":  1}', '{\n\n"a":1}', '{\n' + " " * 41 + '"a":1}']),
        ({"disable_any_whitespace": True}, ['{"a":1}'], ['{"a": 1}']),
        ({"whitespace_pattern": r"\s{0,2}"}, ['{"a":  1}', '{"a":\n\n1}'], ['{"a":   1}']),
        ({"disable_additional_properties": True}, ['{"a": 1}'], ['{"a": 1, "b": 2}']),
    ],
)  # fmt: skip
def test_options_of_json_are_honoured(options: dict[str, Any], texts: list[str], others: list[str]) -> None:
    spec = StructuredOutputs(json={"type": "object", "properties": {"a": {"type": "integer"}}}, **options)
    assert [text for text in texts if not accepts(spec, text)] == []
    assert [text for text in others if accepts(spec, text)] == []
    assert accepts(spec, '{"a":1,"b":2}') is not options.get("disable_additional_properties", False)


def test_additional_properties_are_disabled_in_schemas_and_not_in_data() -> None:
    schema = {
        "$defs": {"p": {"properties": {"properties": {"type": "integer"}}}},
        "anyOf": [{"$ref": "#/$defs/p"}, {"const": {"properties": 1}}],
    }
    spec = StructuredOutputs(json=schema, disable_additional_properties=True)
    assert accepts(spec, '{"properties": 5}')
    assert accepts(spec, '{"properties": 1}')
    assert not accepts(spec, '{"other": 5}')


def test_a_format_that_the_standard_does_not_define_is_no_constraint() -> None:
    spec = StructuredOutputs(json={"type": "string", "format": "file-path"})
    assert accepts(spec, '"any thing"')


def deep(levels: int) -> str:
    return '{"type":"array","items":' * levels + "{}" + "}" * levels


def of_properties(number: int, **others: Any) -> str:
    return json.dumps({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(number)}, **others})


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"json": "{"}, "json cannot be used: EOF while parsing an object"),
        ({"json": "[1]"}, "json cannot be used: the schema must be a JSON object"),
        ({"json": '{"format": '}, "json is not valid JSON: Expecting value: line 1 column 12"),
        ({"json": '{"type": "strin"}'}, "json cannot be used: Invalid type: strin"),
        ({"json": '{"not": {}}'}, 'json cannot be used: Unimplemented keys: ["not"]'),
        ({"json": '{"x-guidance": {"lenient": true}, "not": {}}'}, "json cannot be used: Unimplemented keys"),
        ({"json": '{"type": "string", "format": "iri"}'}, "json cannot be used: Unknown format: iri"),
        ({"json": '{"oneOf": [{"minimum": 1}, {"maximum": 5}]}'}, "oneOf with alternatives that may overlap is not"),
        ({"json": '{"$ref": "https://a.b/c"}'}, "Resource 'https://a.b/c' is not part of the schema, and"),
        ({"json": '{"$ref": "#"}'}, "json cannot be used: no text satisfies it"),
        ({"json": '{"type": "object", "required": ["a"], "properties": {"a": false}}'}, "json cannot be used: "),
        ({"json": "{}", "whitespace_pattern": "x*"}, "whitespace_pattern ('x*') may hold only spaces"),
        ({"regex": "(a"}, 'regex cannot be used: invalid regex "(a"'),
        ({"regex": "(?=x)" + "ab" * 5000}, "look-ahead and look-behind, is not supported"),
        ({"regex": "(?=a)b"}, "look-around, including look-ahead and look-behind, is not supported"),
        ({"regex": r"(a)\1"}, "backreferences are not supported"),
        ({"grammar": "start: x"}, 'grammar cannot be used: at 1(8): unknown name: "x"'),
        ({"grammar": "root ::= x"}, "grammar is not valid GBNF: Rule 'x' not found"),
        ({"grammar": "root ::= " + "(" * 9_000}, "grammar is not valid GBNF: "),
        ({"grammar": "\n".join(f"r{i} ::= r{i + 1}" for i in range(300))}, "grammar has 300 rules and "),
    ],
)  # fmt: skip
def test_a_bad_constraint_is_refused_in_one_line(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Compiler(vocabulary()).compile(StructuredOutputs(**fields))
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


HOSTILE: Final[dict[str, dict[str, str]]] = {
    "deep nesting": {"json": deep(8_000)},
    "nesting at the limit": {"json": deep(60)},
    "a huge minItems": {"json": '{"type":"array","items":{"type":"integer"},"minItems":1000000000}'},
    "huge counts inside each other": {"json": '{"minItems":999,"items":{"minItems":999},"type":"array"}'},
    "a huge minLength": {"json": '{"type":"string","minLength":1000000000}'},
    "endless recursion": {"json": '{"type":"object","properties":{"a":{"$ref":"#"}},"required":["a"]}'},
    "circular references": {"json": '{"$defs":{"a":{"allOf":[{"$ref":"#/$defs/a"}]}},"$ref":"#/$defs/a"}'},
    "exponential references": {
        "json": json.dumps({
            "$defs": {
                f"d{i}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)
            } | {"d40": {}},
            "$ref": "#/$defs/d0",
        })
    },
    "exponential intersections": {
        "json": json.dumps({
            "allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for j in range(3)]} for i in range(15)]
        })
    },
    "thousands of properties": {"json": of_properties(3_000)},
    "thousands of alternatives": {"json": json.dumps({"anyOf": [{"required": [f"p{i}"]} for i in range(2_000)]})},
    "text of the largest size": {"json": '{"const":"' + "x" * (MAX_STRUCTURE_BYTES - 20) + '"}'},
    "a huge multipleOf": {"json": '{"type":"integer","multipleOf":1000000007}'},
    "a nested pattern": {"json": '{"type":"string","pattern":"(.{1,500}a){1,500}"}'},
    "a catastrophic regex": {"regex": "(a+)+$|(a*)*b|(x+x+)+y"},
    "an exponential automaton": {"regex": "(a|b)*a(a|b){300}"},
    "nested repetitions": {"regex": "((a{1,1000}){1,1000}){1,1000}"},
    "a huge repetition": {"regex": "a{1000000000}"},
    "many groups": {"regex": "(" * 50_000 + "a" + ")" * 50_000},
    "intersected automata": {"grammar": "start: X\nX: /.*a.{50}/ & /.*b.{60}/ & ~/.*c.{70}/"},
    "an ambiguous grammar": {"grammar": 'start: e\ne: e e | e e e | "a" | "a" "a"'},
    "a huge rule": {"grammar": 'start: a{100000}\na: "x"'},
    "a chain of GBNF rules": {
        "grammar": "\n".join(["root ::= r0", *(f'r{i} ::= "a" | r{i + 1}' for i in range(250)), 'r250 ::= "c"'])
    },
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_constraint_ends_within_a_second_and_bounded_memory(name: str) -> None:
    """Computing time counts, since other processes may have the cores."""
    spec = StructuredOutputs(**HOSTILE[name])  # type: ignore[arg-type]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    problem = ""
    try:
        Compiler(vocabulary()).compile(spec)
    except InvalidRequest as error:
        problem = str(error)
    assert "\n" not in problem
    assert len(problem) < 500
    assert time.process_time() - started < 1.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024, "KiB"


def test_a_grammar_that_takes_too_long_for_its_tokens_ends_its_own_sequence() -> None:
    matchers = matchers_of(StructuredOutputs(grammar='start: e\ne: e e | e e e | "a" | "a" "a"'))
    token_id = tokenizer().token_to_id("a")
    slowest_s = 0.0
    for _ in range(3_000):
        started = time.thread_time()
        masks = masks_of(matchers, 1)
        slowest_s = max(slowest_s, time.thread_time() - started)
        if not masks.any():
            break
        matchers.advance(1, token_id)
    assert "the grammar takes too much time" in matchers.problem(1)
    assert slowest_s < 4 * MAX_TOKEN_S


def test_the_first_mask_of_a_compiled_grammar_is_known_when_it_is_compiled() -> None:
    spec = StructuredOutputs(json=PERSON)
    first = compiled(spec).copy()
    assert first.get_error() == ""
    assert tokenizer().token_to_id("{") in allowed(matchers_of(spec))
