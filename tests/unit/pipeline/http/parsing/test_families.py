"""Every family's texts give the events they stand for, however the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.http.generation.events import ToolCallBegin
from pipeline.http.parsing.families import CALL_SCRIPTS, HARMONY
from pipeline.http.parsing.formats import OutputFormat
from tests.unit.pipeline.http.parsing.cases import CASES
from tests.unit.pipeline.http.parsing.reading import Case, events_of

by_text = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.family}-{case.text[:30]!r}")


@by_text
def test_a_text_cut_at_any_place_gives_the_same_events(case: Case) -> None:
    for at in range(len(case.text) + 1):
        assert events_of(case, [case.text[:at], case.text[at:]]) == case.events, f"cut at {at}"


@by_text
def test_a_text_gives_its_events_whole_and_by_characters(case: Case) -> None:
    assert events_of(case, [case.text]) == case.events
    assert events_of(case, case.text) == case.events


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_text_cut_at_random_gives_the_same_events(data: st.DataObject) -> None:
    case = data.draw(st.sampled_from(CASES))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(case.text)), max_size=12)))
    pieces = [case.text[a:b] for a, b in zip([0, *cuts], [*cuts, len(case.text)], strict=True)]
    assert events_of(case, pieces) == case.events


def test_every_family_has_texts() -> None:
    assert {case.family for case in CASES} >= {*CALL_SCRIPTS, HARMONY, None}


@pytest.mark.parametrize("family", ["mistral", "mistral_list"])
def test_calls_without_an_id_get_one_that_the_templates_of_the_family_take(family: str) -> None:
    reader = OutputFormat(tool_parser=family).parser(reads_calls="native", tools=[], starts_in_reasoning=False)
    events = reader.push("[TOOL_CALLS]f[ARGS]{}" * 20)
    drawn = {event.call_id or "" for event in events if isinstance(event, ToolCallBegin)}
    assert len(drawn) == 20
    assert all(len(call_id) == 9 and call_id.isalnum() and call_id.isascii() for call_id in drawn)
