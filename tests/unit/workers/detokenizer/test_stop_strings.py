from __future__ import annotations

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from workers.detokenizer.stop_strings import StopMatcher


def text_before_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """Character by character: the first string to be complete ends the text."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@settings(max_examples=1_000, deadline=None)
@given(
    pieces=st.lists(st.text("abc", max_size=6), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=6), min_size=1, max_size=4),
)
def test_text_ends_before_the_first_stop_string_however_it_is_cut(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    given_out = ""
    expected, stopped = text_before_stop("".join(pieces), stops)
    for piece in pieces:
        given_out += matcher.feed(piece)
        assert expected.startswith(given_out)  # nothing has to be taken back
    assert matcher.matched == stopped
    assert given_out + matcher.finish() == expected


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["END", "\n\n"])
    assert matcher.feed("an E") == "an "
    assert matcher.feed("agle\n") == "Eagle"
    assert matcher.feed("E") == "\n"
    assert matcher.feed("NDx") == ""
    assert matcher.matched


def test_many_long_stop_strings_cost_linear_time() -> None:
    matcher = StopMatcher(["a" * 255 + chr(ord("b") + i) for i in range(16)])
    started = time.perf_counter()
    for _ in range(1_000):
        matcher.feed("aaaa")
    assert time.perf_counter() - started < 2
