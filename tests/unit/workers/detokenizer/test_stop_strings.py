from __future__ import annotations

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from workers.detokenizer.stop_strings import StopMatcher


def text_before_stop(text: str, stops: list[str], start: int = 0, *, includes: bool = False) -> tuple[str, str]:
    """Character by character: the first string to be complete behind `start` ends the text."""
    for end in range(start + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - (0 if includes else len(longest))], longest
    return text, ""


@settings(max_examples=1_000, deadline=None)
@given(
    pieces=st.lists(st.text("abc", max_size=6), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=6), min_size=1, max_size=4),
    min_pieces=st.integers(0, 4),
    includes=st.booleans(),
    hidden=st.none() | st.text("abc", max_size=6),
)
def test_text_ends_at_the_first_stop_string_however_it_is_cut(
    pieces: list[str], stops: list[str], min_pieces: int, includes: bool, hidden: str | None
) -> None:
    matcher = StopMatcher(stops, includes_stop=includes)
    given_out, shown = "", "".join(pieces)
    hidden = None if includes else hidden  # with the stop string, the token that ends the sequence is shown
    start = len("".join(pieces[:min_pieces]))
    expected, stop = text_before_stop(shown + (hidden or ""), stops, start, includes=includes)
    expected = expected[: len(shown)]
    for at, piece in enumerate(pieces):
        given_out += matcher.feed(piece, may_match=at >= min_pieces)
        assert expected.startswith(given_out)  # nothing has to be taken back
        assert not includes or matcher.matched or given_out.endswith(piece)  # and nothing is held back
    if hidden is not None and not matcher.matched:
        given_out += matcher.feed_hidden(hidden, may_match=True)
    assert matcher.matched == stop
    assert given_out + matcher.finish() == expected


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["END", "\n\n"])
    assert matcher.feed("an E") == "an "
    assert matcher.feed("agle\n") == "Eagle"
    assert matcher.feed("E") == "\n"
    assert matcher.feed("NDx") == ""
    assert matcher.matched == "END"


def test_many_long_stop_strings_cost_linear_time() -> None:
    matcher = StopMatcher(["a" * 255 + chr(ord("b") + i) for i in range(16)])
    started = time.perf_counter()
    for _ in range(1_000):
        matcher.feed("aaaa")
    assert time.perf_counter() - started < 2
