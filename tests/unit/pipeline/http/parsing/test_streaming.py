"""Parsers hold back only the text that they cannot judge yet."""

from __future__ import annotations

import pytest

from pipeline.http.generation.events import Content, Reasoning, ToolArguments, ToolCallBegin
from pipeline.http.parsing.families import CALL_SCRIPTS, HARMONY, REASONING_TAGS
from pipeline.http.parsing.formats import OutputFormat, OutputParser
from pipeline.http.parsing.native_forms import NATIVE_FORMS
from tests.unit.pipeline.http.parsing.reading import TOOLS

NATIVE = [family for family in CALL_SCRIPTS if NATIVE_FORMS[family].trigger]


def parser(family: str | None, **options: object) -> OutputParser:
    return OutputFormat(tool_parser=family, **options).parser(  # type: ignore[arg-type]
        reads_calls="native", tools=TOOLS, starts_in_reasoning=False
    )


@pytest.mark.parametrize("family", [*CALL_SCRIPTS, HARMONY, None])
def test_plain_text_leaves_at_once(family: str | None) -> None:
    reader = parser(family)
    for piece in ("It", " rains", " 在北京", ".\n", "a b"):
        assert reader.push(piece) == [Content(piece)]


@pytest.mark.parametrize("family", NATIVE)
def test_only_the_tail_that_can_begin_a_call_is_held_back(family: str) -> None:
    trigger = NATIVE_FORMS[family].trigger
    reader = parser(family)
    assert reader.push(f"text {trigger[:-1]}") == [Content("text ")]
    assert reader.push("!") == [Content(f"{trigger[:-1]}!")]
    assert reader.push(trigger[:1]) == []
    assert reader.finish() == [Content(trigger[:1])]


@pytest.mark.parametrize("family", [name for name in CALL_SCRIPTS if NATIVE_FORMS[name].arguments == "json"])
def test_arguments_stream_as_they_arrive(family: str) -> None:
    form = NATIVE_FORMS[family]
    reader = parser(family)
    events = reader.push(f"{form.section_begin}{form.begin}get_weather{form.middle.replace('{index}', '0')}{{")
    assert isinstance(events[0], ToolCallBegin)
    assert events[1:] == [ToolArguments("{")]
    for piece in ('"city', '": "Z', "ü", "}{", "[\\", '"x', '"', "}"):
        assert reader.push(piece) in ([ToolArguments(piece)], [ToolArguments("[")], [ToolArguments('\\"x')])


@pytest.mark.parametrize("family", [name for name in CALL_SCRIPTS if NATIVE_FORMS[name].arguments != "json"])
def test_texts_among_arguments_stream_as_they_arrive(family: str) -> None:
    form = NATIVE_FORMS[family]
    opening = f"{form.xml.key_begin}city{form.xml.key_end}{form.xml.value_begin}" if form.xml else 'city="'
    reader = parser(family)
    events = reader.push(f"{form.section_begin}{form.begin}get_weather{form.middle}{opening}A")
    assert isinstance(events[0], ToolCallBegin)
    assert events[1:] == [ToolArguments('{"city": "A')]
    for piece in (" long", " text", " 北京"):
        assert reader.push(piece) == [ToolArguments(piece)]


@pytest.mark.parametrize("family", ["llama3_json", None])
def test_json_that_turns_out_to_be_no_call_leaves_at_that_place(family: str | None) -> None:
    reader = parser(family)
    assert reader.push('{"name": "Ada') == []
    assert reader.push(" Lovelace") == [Content('{"name": "Ada Lovelace')]
    assert reader.push('", "born": 1815}') == [Content('", "born": 1815}')]


@pytest.mark.parametrize("tags", REASONING_TAGS.values())
def test_reasoning_streams_as_it_arrives(tags: tuple[str, str]) -> None:
    reader = parser("hermes", reasoning_tags=tags)
    assert reader.push(tags[0] + "I") == [Reasoning("I")]
    assert reader.push(" think" + tags[1][:3]) == [Reasoning(" think")]
    assert reader.push(tags[1][3:] + "So") == [Content("So")]


def test_reading_takes_time_in_proportion_to_the_text() -> None:
    """Counts the characters that the scanner copies, which a rescan or a growing buffer would multiply."""
    reader = parser("hermes")
    for _ in range(20_000):
        assert reader.push("x y") == [Content("x y")]
    reader.push('<tool_call>{"name": "now", "arguments": {"a": "')
    for _ in range(20_000):
        assert reader.push("x y") == [ToolArguments("x y")]
        assert len(reader._scanner.text) <= 3  # type: ignore[attr-defined]
