"""Finds the first stop string in a text that arrives piece by piece.

Holds back the end of the text while it may be the beginning of a stop string.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from tokenizers import Tokenizer

_ALL_MARKS: Final = dict.fromkeys(range(0xDC00, 0xE000))  # lone surrogates: decoded text never contains one
_NO_MARKS: Final[dict[int, str]] = {}


class SpecialTokens:
    """Lets stop strings contain special tokens, which have no text: each one is replaced by a mark."""

    def __init__(self, contents: Mapping[int, str]) -> None:
        self._ids = {content: token_id for token_id, content in contents.items() if content}
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> SpecialTokens:
        return cls({i: token.content for i, token in tokenizer.get_added_tokens_decoder().items() if token.special})

    def matcher(self, stops: list[str]) -> StopMatcher:
        """A new matcher of these strings, both as they are and with marks for the special tokens in them."""
        pattern = self._pattern
        if pattern is None:
            return StopMatcher(stops)
        found = dict.fromkeys(content for stop in stops for content in pattern.findall(stop))
        marks = {content: chr(mark) for content, mark in zip(found, _ALL_MARKS, strict=False)}
        marked = [pattern.sub(lambda match: marks.get(match[0], match[0]), stop) for stop in stops]
        return StopMatcher(
            list(dict.fromkeys(stops + marked)), {self._ids[content]: mark for content, mark in marks.items()}
        )


class StopMatcher:
    """One sequence's stop strings, each with the Knuth-Morris-Pratt automaton: time linear in the text.

    The string that is complete first ends the text, however the text is cut into pieces. If several strings end at the
    same character, the longest one counts. `matched` says that a string was found. `marks` gives, by token id, the mark
    to feed for a special token; output text never contains marks.
    """

    __slots__ = ("_fallbacks", "_matched_chars", "_stops", "held", "marks", "matched")

    def __init__(self, stops: list[str], marks: dict[int, str] = _NO_MARKS) -> None:
        self._stops = stops
        self.marks = marks
        self._fallbacks = [_fallback(stop) for stop in stops]
        self._matched_chars = [0] * len(stops)  # how many leading characters of each end the text so far
        self.held = ""  # end of the text that may be the beginning of a stop string
        self.matched = False

    def feed(self, piece: str) -> str:
        """Add a piece of text. Returns the text that can be part of no stop string; after a match, no text."""
        if self.matched:
            return ""
        text = self.held + piece
        end, length = len(piece) + 1, 0
        for which, stop in enumerate(self._stops):
            found = self._advance(which, stop, piece)
            if found and (found < end or (found == end and len(stop) > length)):
                end, length = found, len(stop)
        if length:
            self.matched = True
            text = text[: len(self.held) + end - length]
            self.held = ""
            return self._visible(text)
        num_certain = len(text) - max(self._matched_chars)
        self.held = text[num_certain:]
        text = text[:num_certain]
        return self._visible(text) if self.marks else text

    def finish(self) -> str:
        """The text that was held back. Call it when the text ends without a stop string."""
        held, self.held = self.held, ""
        return self._visible(held)

    def _visible(self, text: str) -> str:
        return text.translate(_ALL_MARKS) if self.marks else text

    def _advance(self, which: int, stop: str, piece: str) -> int:
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
                return at
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
