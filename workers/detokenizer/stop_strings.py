"""Finds the first stop string in a text that arrives piece by piece.

Holds back the end of the text while it may be the beginning of a stop string.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final

from ipc.messages import TextOptions

_ALL_MARKS: Final = dict.fromkeys(range(0xDC00, 0xE000))  # lone surrogates: decoded text never contains one
_NO_MARKS: Final[dict[int, str]] = {}
_NONE_REPLACED: Final[dict[str, str]] = {}


class SpecialTokens:
    """Lets stop strings contain special tokens. Each one that has no text is replaced by a mark."""

    def __init__(self, contents: Mapping[int, str], shown_text: Callable[[int], str]) -> None:
        self._names = contents
        self._shown_text = shown_text
        self._ids = {content: token_id for token_id, content in contents.items() if content}
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def matcher(self, options: TextOptions) -> StopMatcher | None:
        """A new matcher of a request's stop strings; None if it has none.

        The strings also count with other texts in place of the special tokens in them. If special tokens have no text,
        these are marks; otherwise, they are the tokens' text in the output, which may have spaces in front or inside.
        """
        stops, includes = options.stop, options.include_stop_str_in_output
        if not stops:
            return None
        pattern = self._pattern
        if pattern is None:
            return StopMatcher(stops, includes_stop=includes)
        if not options.skip_special_tokens:
            shown = [pattern.sub(lambda match: self._shown_text(self._ids[match[0]]), stop) for stop in stops]
            kept = [stop for stop in dict.fromkeys(stops + shown) if stop]
            requested = dict(zip(shown, stops, strict=True))
            return StopMatcher(kept, names=self._names, includes_stop=includes, requested=requested)
        found = dict.fromkeys(content for stop in stops for content in pattern.findall(stop))
        marks = {content: chr(mark) for content, mark in zip(found, _ALL_MARKS, strict=False)}
        marked = [pattern.sub(lambda match: marks.get(match[0], match[0]), stop) for stop in stops]
        by_id = {self._ids[content]: mark for content, mark in marks.items()}
        requested = dict(zip(marked, stops, strict=True))
        return StopMatcher(
            list(dict.fromkeys(stops + marked)), by_id, by_id, includes_stop=includes, requested=requested
        )


class StopMatcher:
    """One sequence's stop strings, each with the Knuth-Morris-Pratt automaton: time linear in the text.

    The string that is complete first ends the text, however the text is cut into pieces. If several strings end at the
    same character, the longest one counts. `matched` is the string that was found, as the
    request has it; "" = none yet.

    Args:
        marks: by token id, the mark to feed for a special token; output text never contains marks.
        names: by token id, the text to feed for a special token that ends the sequence and is not shown.
        includes_stop: the text ends behind the stop string, not before it.
        requested: by stop string, the request's own one, where `stops` has another text for its special tokens.
    """

    __slots__ = (
        "_fallbacks", "_includes_stop", "_matched_chars", "_requested", "_stops", "held", "marks", "matched", "names",
    )  # fmt: skip

    def __init__(
        self,
        stops: list[str],
        marks: Mapping[int, str] = _NO_MARKS,
        names: Mapping[int, str] = _NO_MARKS,
        *,
        includes_stop: bool = False,
        requested: Mapping[str, str] = _NONE_REPLACED,
    ) -> None:
        self._stops = stops
        self._includes_stop = includes_stop
        self._requested = requested
        self.marks = marks
        self.names = names
        self._fallbacks = [_fallback(stop) for stop in stops]
        self._matched_chars = [0] * len(stops)  # how many leading characters of each end the text so far
        self.held = ""  # end of the text that may be the beginning of a stop string
        self.matched = ""

    def feed(self, piece: str, *, may_match: bool = True) -> str:
        """Add a piece of text. Returns the text that the output is certain to contain; after a match, no text.

        With `may_match` False, a string that is complete within this piece does not end the text.
        """
        if self.matched:
            return ""
        text = self.held + piece
        end, longest = len(piece) + 1, ""
        for which, stop in enumerate(self._stops):
            found = self._advance(which, stop, piece, may_match)
            if found and (found < end or (found == end and len(stop) > len(longest))):
                end, longest = found, stop
        if longest:
            self.matched = self._requested.get(longest, longest)
            text = text[: len(self.held) + end - (0 if self._includes_stop else len(longest))]
            self.held = ""
            return self._visible(text)
        num_certain = len(text) - (0 if self._includes_stop else max(self._matched_chars))
        self.held = text[num_certain:]
        text = text[:num_certain]
        return self._visible(text) if self.marks else text

    def feed_hidden(self, name: str, *, may_match: bool = True) -> str:
        """End with a token that the output does not show, though its name may complete a stop string.

        Returns the rest of the output.
        """
        held = self._visible(self.held)
        text = self.feed(name, may_match=may_match)
        self.held = ""
        return text[: len(held)] if self.matched else held

    def finish(self) -> str:
        """The text that was held back. Call it when the text ends without a stop string."""
        held, self.held = self.held, ""
        return self._visible(held)

    def _visible(self, text: str) -> str:
        return text.translate(_ALL_MARKS) if self.marks else text

    def _advance(self, which: int, stop: str, piece: str, may_match: bool) -> int:
        """Run one automaton over the piece. Returns the end of the first match in the piece; 0 = no match."""
        matched = self._matched_chars[which]
        fallback = self._fallbacks[which]
        at = 0
        while at < len(piece):
            if matched == 0:  # look for a beginning at the speed of C
                at = piece.find(stop[0], at)
                if at < 0:
                    break
            character = piece[at]
            while matched and stop[matched] != character:
                matched = fallback[matched - 1]
            if stop[matched] == character:
                matched += 1
            at += 1
            if matched == len(stop):
                if may_match:
                    return at
                matched = fallback[-1]
        self._matched_chars[which] = matched
        return 0


def _fallback(stop: str) -> list[int]:
    """By prefix length - 1: the length of the longest proper prefix of `stop` that also ends that prefix."""
    table = [0] * len(stop)
    matched = 0
    for at in range(1, len(stop)):
        while matched and stop[matched] != stop[at]:
            matched = table[matched - 1]
        if stop[matched] == stop[at]:
            matched += 1
        table[at] = matched
    return table
