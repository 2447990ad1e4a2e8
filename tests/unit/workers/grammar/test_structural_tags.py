"""Free text that switches to a schema inside tags, in vLLM's form and in xgrammar's."""

from __future__ import annotations

import json
from typing import Any, Final

import pytest

from ipc.errors import InvalidRequest
from ipc.structured_outputs import StructuredOutputs
from tests.unit.workers.grammar.grammar_tools import accepts, vocabulary, walk
from workers.grammar.compiler import Compiler

SCHEMA: Final = {
    "type": "object", "properties": {"a": {"type": "integer", "maximum": 9, "minimum": 0}}, "required": ["a"],
    "additionalProperties": False,
}  # fmt: skip
JSON: Final = {"type": "json_schema", "json_schema": SCHEMA}
TEXT: Final = {"type": "any_text"}
TEXT_BEFORE_JSON: Final = {"type": "sequence", "elements": [TEXT, JSON]}


def spec_of(**fields: Any) -> StructuredOutputs:
    return StructuredOutputs(structural_tag=json.dumps({"type": "structural_tag", **fields}))


def tag(begin: Any, content: Any, end: Any) -> dict[str, Any]:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def triggered(*tags: dict[str, Any], triggers: tuple[str, ...] = ("<f=",), **options: Any) -> dict[str, Any]:
    return {"type": "triggered_tags", "triggers": list(triggers), "tags": list(tags), **options}


def sequence(*elements: dict[str, Any]) -> dict[str, Any]:
    return {"type": "sequence", "elements": list(elements)}


CALL: Final = tag("<f=a>", JSON, "</f>")
VLLM: Final = {
    "structures": [
        {"begin": "<f=a>", "schema": SCHEMA, "end": "</f>"},
        {"begin": "<f=b>", "schema": json.dumps({"enum": ["x", "y"]}), "end": "</f>"},
    ],
    "triggers": ["<f="],
}


@pytest.mark.parametrize(
    ("fields", "texts", "others"),
    [
        (
            VLLM,
            ["", "just text", 'so: <f=a>{"a": 1}</f> and <f=b>"x"</f>.', '<f=a>{"a":1}</f>'],
            ["<f=c>", '<f=a>{"b":1}</f>', '<f=a>{"a": 1}</f', "text <f=", '<f=b>"x"</f><f=b>"z"</f>'],
        ),
        ({"format": triggered(CALL, at_least_one=True)}, ['<f=a>{"a":1}</f> text'], ["", 'text <f=a>{"a":1}</f>']),
        (
            {"format": triggered(CALL, stop_after_first=True)},
            ["text", 'text <f=a>{"a":1}</f>'],
            ['text <f=a>{"a":1}</f> text'],
        ),
        (
            {"format": triggered(CALL, at_least_one=True, stop_after_first=True)},
            ['<f=a>{"a":1}</f>'],
            ["text", '<f=a>{"a":1}</f><f=a>{"a":1}</f>'],
        ),
        (
            {"format": sequence(tag("<think>", TEXT, "</think>"), triggered(CALL))},
            ["<think>a < b</think>so", '<think></think><f=a>{"a":1}</f>'],
            ["text", "<think>never ends", "<think>x</think><f=b>"],
        ),
        (
            {"format": tag("<t>", triggered(CALL), "</t>")},
            ["<t>text</t>", '<t>text <f=a>{"a":1}</f> text</t>'],
            ["<t>text", "<t>text</t>text", "<t><f=a></t>"],
        ),
        (
            {
                "format": {
                    "type": "tags_with_separator",
                    "tags": [CALL, tag("<n>", {"type": "regex", "pattern": "[0-9/]+"}, ["</n>", "</m>"])],
                    "separator": ", ",
                }
            },
            ["", '<f=a>{"a":1}</f>, <n>1/2</m>, <n>3</n>'],
            ["text", "<n>1</n>, ", "<n>1</n><n>2</n>"],
        ),
        (
            {
                "format": {
                    "type": "or",
                    "elements": [
                        {"type": "const_string", "value": "no/é\n"},
                        {"type": "grammar", "grammar": 'root ::= "(" root ")" | "yes"'},
                    ],
                }
            },
            ["no/é\n", "((yes))"],
            ["", "no", "((yes)"],
        ),
        (
            {"format": sequence(TEXT, {"type": "const_string", "value": "Answer:"}, JSON)},
            ['I think. Answer:{"a":1}', 'Answer:{"a":1}'],
            ["I think.", 'Answer:Answer:{"a":1}'],
        ),
        (
            {"format": {"type": "repeat", "min": 2, "max": 3, "content": tag("<", JSON, ">")}},
            ['<{"a":1}><{"a":2}>', '<{"a":1}><{"a":2}><{"a":3}>'],
            ['<{"a":1}>', '<{"a":1}><{"a":2}><{"a":3}><{"a":4}>'],
        ),
        (
            {"format": tag("<n>", {"type": "regex", "pattern": ".*"}, ["</n>", "<|user|>"])},
            ["<n>a<b</n>", "<n></n>", "<n>x<|user|>"],
            ["<n>a\n</n>", "<n>a</n></n>", "<n>a"],
        ),
        (
            {"format": sequence({"type": "optional", "content": CALL}, {"type": "const_string", "value": "."})},
            [".", '<f=a>{"a":1}</f>.'],
            ["", '<f=a>{"a":1}</f><f=a>{"a":1}</f>.'],
        ),
    ],
)
def test_text_is_free_outside_of_tags_and_follows_the_schema_inside(
    fields: dict[str, Any], texts: list[str], others: list[str]
) -> None:
    spec = spec_of(**fields)
    assert [text for text in texts if not accepts(spec, text)] == []
    assert [text for text in others if accepts(spec, text)] == []


def test_random_texts_have_valid_json_in_every_tag() -> None:
    spec = spec_of(format=triggered(CALL, at_least_one=True))
    num_calls = 0
    for seed in range(8):
        text, has_ended = walk(spec, seed)
        for part in text.split("<f=")[1:] if has_ended else ():
            num_calls += 1
            content, end, _ = part.removeprefix("a>").partition("</f>")
            assert end
            assert list(json.loads(content)) == ["a"]
    assert num_calls >= 4


@pytest.mark.parametrize("spelled_out", [False, True])
def test_a_special_token_in_a_tag_may_be_the_token_or_its_text(spelled_out: bool) -> None:
    spec = spec_of(
        structures=[{"begin": "<|system|>go ", "schema": SCHEMA, "end": "<|user|>"}], triggers=["<|system|>"]
    )
    assert accepts(spec, 'text <|system|>go {"a":1}<|user|> text', spelled_out)
    assert not accepts(spec, "text <|system|>stop", spelled_out)
    assert accepts(spec, "text <|user|>", spelled_out) is spelled_out


def test_tokens_can_begin_and_end_tags() -> None:
    spec = spec_of(format=tag({"type": "token", "token": "<|system|>"}, TEXT, {"type": "token", "token": 3}))
    assert accepts(spec, "<|system|>text<|user|>")
    assert not accepts(spec, "<|system|>text")


def test_the_options_of_json_apply_inside_tags() -> None:
    text = json.dumps({"type": "structural_tag", **VLLM})
    compact = StructuredOutputs(structural_tag=text, disable_any_whitespace=True)
    assert accepts(compact, '<f=a>{"a":1}</f>')
    assert not accepts(compact, '<f=a>{"a": 1}</f>')
    assert not accepts(StructuredOutputs(structural_tag=text), '<f=a>{"a":  1}</f>')


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "structural_tag is not valid JSON: "),
        ("[]", 'structural_tag must be a JSON object with "type": "structural_tag"'),
        ({}, "structural_tag.structures (None) must be a list"),
        ({"structures": [5], "triggers": ["a"]}, "structural_tag.structures must be a list of objects"),
        ({"structures": [{"begin": "<a>"}], "triggers": ["<a"]}, "structural_tag.end (None) must be a string"),
        ({**VLLM, "triggers": ["<g"]}, "a tag that begins with '<f=a>', and no trigger begins it"),
        (
            {"format": triggered(tag("<f=a>", TEXT, "z"), tag("", TEXT, "z"))},
            "a tag that begins with ''",
        ),
        ({**VLLM, "triggers": ["<f", "<g"]}, "the trigger '<g', and no tag begins with it"),
        ({**VLLM, "triggers": []}, "triggers must be a list of at least one string"),
        ({"format": {"type": "qwen_xml_parameter"}}, "has the format 'qwen_xml_parameter': known formats are"),
        ({"format": {**JSON, "style": "qwen_xml"}}, "json_schema has style = qwen_xml, which cannot be honoured"),
        ({"format": {**TEXT, "max_tokens": 5}}, "any_text has max_tokens = 5, which cannot be honoured"),
        ({"format": TEXT_BEFORE_JSON}, "any_text before something else than a fixed text"),
        ({"format": {"type": "or", "elements": []}}, "an empty list of elements or tags"),
        ({"format": {"type": "token", "token": "word"}}, "the token 'word': it must be an id below 4096"),
        ({"format": {"type": "json_schema", "json_schema": {"not": {}}}}, 'Unimplemented keys: ["not"]'),
        ({"format": {"type": "json_schema", "json_schema": [1]}}, "it must be a JSON object, or true"),
        ({"format": {"type": "repeat", "min": 2, "max": 1, "content": JSON}}, "min 2 and max 1"),
        ({"format": triggered(tag("x<|user|>y", TEXT, "z"), triggers=("x<|user|>",))}, "a special token in it"),
    ],
)
def test_a_structural_tag_that_cannot_be_honoured_is_refused(text: Any, problem: str) -> None:
    spec = spec_of(**text) if isinstance(text, dict) else StructuredOutputs(structural_tag=text)
    with pytest.raises(InvalidRequest) as caught:
        Compiler(vocabulary()).compile(spec)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_formats_inside_each_other_are_bounded() -> None:
    node: dict[str, Any] = JSON
    for _ in range(40):
        node = sequence(node)
    with pytest.raises(InvalidRequest, match="more than 32 formats inside each other"):
        Compiler(vocabulary()).compile(spec_of(format=node))
