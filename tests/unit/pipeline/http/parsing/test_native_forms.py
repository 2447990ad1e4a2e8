"""The parser of a family reads every text that a grammar makes from the family's form."""

from __future__ import annotations

import pytest

from pipeline.http.parsing.families import CALL_SCRIPTS, HARMONY
from pipeline.http.parsing.native_forms import JSON_LIST, NATIVE_FORMS, NativeForm
from tests.unit.pipeline.http.parsing.reading import Case, arguments, events_of

VALUES = {"city": "Zürich 🌧", "days": 3}


def written(form: NativeForm) -> str:
    """The arguments as the family writes them."""
    if form.xml is not None:
        return "".join(
            f"{form.xml.key_begin}{key}{form.xml.key_end}{form.xml.value_begin}{value}{form.xml.value_end}"
            for key, value in VALUES.items()
        )
    return 'city="Zürich 🌧", days=3' if form.arguments == "python" else '{"city": "Zürich 🌧", "days": 3}'


@pytest.mark.parametrize("family", [*NATIVE_FORMS, None])
def test_calls_in_the_form_of_a_family_are_read_by_its_parser(family: str | None) -> None:
    form = NATIVE_FORMS[family] if family else JSON_LIST
    empty = "{}" if form.arguments == "json" else ""
    calls = [form.example("get_weather", written(form), index=0), form.example("now", empty, index=1)]
    calls = calls if form.allows_parallel_calls else calls[:1]
    text = form.section_begin + form.separator.join(calls) + form.section_end

    events = events_of(Case(family, text, [], form="native" if family else "json_list"), [text])

    assert arguments(events) == [VALUES, {}][: len(calls)]
    assert [event.name for event in events if hasattr(event, "name")] == ["get_weather", "now"][: len(calls)]
    assert len(events) == 2 * len(calls), "all the text is calls"


def test_every_form_has_a_parser_and_every_parser_a_form() -> None:
    assert set(NATIVE_FORMS) == {*CALL_SCRIPTS, HARMONY}
