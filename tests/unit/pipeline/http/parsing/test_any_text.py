"""Texts that no model should write: parsers never fail on them, lose nothing and read them the same however cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.http.generation.events import Content, ToolCallBegin
from pipeline.http.parsing.families import CALL_SCRIPTS, HARMONY
from pipeline.http.parsing.formats import CallForm
from pipeline.http.parsing.native_forms import NATIVE_FORMS
from tests.unit.pipeline.http.parsing.cases import CASES
from tests.unit.pipeline.http.parsing.reading import WEATHER, Case, events_of

ANY = [*'{}[]()<>"\\,:;=|/ \n', "a", "0", "é", "🌧", "name", "arguments", '"name": "now"', '"arguments": {', "now", '""']
FAMILIES = [*CALL_SCRIPTS, HARMONY, None]


def fragments(family: str | None) -> list[str]:
    """The markers of a family, whole and broken, and what may stand between them."""
    form = NATIVE_FORMS.get(family or "")
    texts = [*form.markers, form.separator] if form else []
    if form and form.xml:
        texts += [form.xml.key_begin, form.xml.key_end, form.xml.value_begin, form.xml.value_end]
    if family == HARMONY:
        texts += ["<|start|>assistant", "<|channel|>", "final", "analysis", "<|message|>", "<|end|>", " to=functions.x"]
    return [*ANY, *filter(None, texts), *(text[:-1] for text in texts if len(text) > 1)]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FAMILIES), st.data())
def test_any_text_gives_the_same_events_however_it_is_cut(family: str | None, data: st.DataObject) -> None:
    text = "".join(data.draw(st.lists(st.sampled_from(fragments(family)), max_size=25)))
    form: CallForm = data.draw(st.sampled_from(("native", "native", "json_list", "json_arguments", "none")))
    reasoning = "harmony" if family == HARMONY else data.draw(st.sampled_from(("think", None)))
    case = Case(family, text, [], reasoning, data.draw(st.booleans()), form, [WEATHER])
    whole = events_of(case, [text])
    assert events_of(case, text) == whole
    at = data.draw(st.integers(0, len(text)))
    assert events_of(case, [text[:at], text[at:]]) == whole


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([*CALL_SCRIPTS, None]), st.data())
def test_any_text_without_a_call_is_content_byte_for_byte(family: str | None, data: st.DataObject) -> None:
    text = "".join(data.draw(st.lists(st.sampled_from(fragments(family)), max_size=25)))
    events = events_of(Case(family, text, []), [text])
    if not any(isinstance(event, ToolCallBegin) for event in events):
        assert events == ([Content(text)] if text else [])


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.family}-{case.text[:30]!r}")
def test_a_text_cut_off_anywhere_has_the_beginning_of_the_whole_text_s_calls(case: Case) -> None:
    names = [event for event in case.events if isinstance(event, ToolCallBegin)]
    for at in range(len(case.text)):
        begun = [event for event in events_of(case, [case.text[:at]]) if isinstance(event, ToolCallBegin)]
        assert begun == names[: len(begun)]


def test_a_value_nested_without_end_does_not_exhaust_the_stack() -> None:
    deep = "[" * 5000
    for family, text in (
        ("pythonic", f"[now(a={deep}"),
        ("hermes", f'<tool_call>{{"name": "now", "arguments": {deep}'),
    ):
        assert events_of(Case(family, text, []), [text])[0] == ToolCallBegin("now")
    glm = f"<tool_call>now\n<arg_key>a</arg_key>\n<arg_value>{deep}</arg_value>\n</tool_call>"
    assert events_of(Case("glm45", glm, []), [glm])[0] == ToolCallBegin("now")
