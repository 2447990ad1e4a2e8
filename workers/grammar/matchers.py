"""The matchers of all running structured sequences: follows their tokens and fills their masks.

Knows no sockets and no rings. One thread uses it. A sequence that cannot go on has a closed mask (all zero), and its
problem can be asked for.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from workers.grammar.compiler import MAX_TOKEN_S, Prototype
from workers.grammar.vocabulary import Vocabulary

MEAN_TOKEN_S: Final = 0.002  # computing time that a sequence earns with each token, up to MAX_TOKEN_S
REPLAYED_TOKEN_S: Final = 0.000_05  # the same, for a token that a resumed sequence brings; 3 us are usual
_MAX_PROBLEM_CHARS: Final = 300


class Matcher:
    """Where one sequence stands in its grammar. `problem` is the reason why it cannot go on; empty: it can."""

    def __init__(self, prototype: Prototype, vocabulary: Vocabulary, end_ids: Iterable[int]) -> None:
        self._matcher: Final = prototype.copy()
        self._end_ids: Final = frozenset(token_id for token_id in end_ids if 0 <= token_id < vocabulary.size)
        self._ends: Final = _words(self._end_ids)
        not_text = _words({*self._end_ids, vocabulary.end_id, *vocabulary.padding_ids})
        self._replaced: Final = [(word, bits, self._ends.get(word, np.int32(0))) for word, bits in not_text.items()]
        self._has_ended = False
        self._credit_s = MAX_TOKEN_S
        self.problem = ""

    def spend(self, took_s: float) -> None:
        """Account for computing time. A grammar that delays the masks of other sequences sets `problem`."""
        self._credit_s -= took_s
        if self._credit_s < 0 and not self.problem:
            self.problem = (
                f"the grammar takes too much time (over {MAX_TOKEN_S} s for one token, or {MEAN_TOKEN_S} s for each of "
                "many): simplify it"
            )

    def is_complete(self) -> bool:
        """Whether the text so far satisfies the constraint."""
        return not self.problem and self._matcher.is_accepting()

    def replay(self, token_ids: Iterable[int]) -> None:
        """Follow the sequence by tokens that it brings, all at once. A token earns much less time here than later.

        A mask takes most of the time that a sampled token earns, and here nobody asks for masks. Besides, the masks of
        all other sequences wait for this.
        """
        for token_id in token_ids:
            started = time.thread_time()
            self.advance(token_id, earns_s=REPLAYED_TOKEN_S)
            self.spend(time.thread_time() - started)
            if self.problem:
                return
        self._credit_s = MAX_TOKEN_S

    def advance(self, token_id: int, earns_s: float = MEAN_TOKEN_S) -> None:
        """Follow the sequence by one token. A token that the grammar does not allow sets `problem`."""
        if self.problem:
            return
        self._credit_s = min(self._credit_s + earns_s, MAX_TOKEN_S)
        if self._has_ended:
            self.problem = f"token {token_id} follows the end of the text"
        elif token_id in self._end_ids:
            self._has_ended = self._matcher.is_accepting()
            self.problem = "" if self._has_ended else f"token {token_id} ends a text that is not complete"
        elif not self._matcher.consume_token(token_id):
            self.problem = (
                f"token {token_id} does not fit the grammar: {_first_line(self._matcher) or 'the text has ended'}"
            )

    def fill(self, mask: NDArray[np.int32], scratch: NDArray[np.int32]) -> None:
        """Write which tokens may come next: those of the grammar, and the end ids exactly if the text is complete.

        `mask` has `Vocabulary.num_words` words; `scratch`, which is overwritten, a bit for each of `Vocabulary.tokens`.
        """
        mask[:] = 0
        if self.problem:
            return
        is_complete = self._matcher.is_accepting()
        if self._has_ended or (is_complete and self._matcher.is_stopped()):
            for word, bits in self._ends.items():
                mask[word] = bits
            return
        self._matcher.unsafe_compute_mask_ptr(scratch.ctypes.data, scratch.nbytes)
        if self._matcher.is_error():
            self.problem = f"the grammar cannot go on: {_first_line(self._matcher)}"
            return
        mask[:] = scratch[: len(mask)]
        is_less = False
        for word, bits, ends in self._replaced:
            is_less |= bool(mask[word] & bits)
            mask[word] = (mask[word] & ~bits) | (ends if is_complete else 0)
        if is_less and not mask.any():
            self.problem = "the grammar allows only tokens that end the text, which is not complete"


class Matchers:
    """The matchers of all structured sequences of one grammar process, by key."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary: Final = vocabulary
        self._scratch: Final = np.zeros(-(-vocabulary.tokens.vocab_size // 32), np.int32)
        self._matchers: Final[dict[int, Matcher]] = {}

    def __len__(self) -> int:
        return len(self._matchers)

    def __contains__(self, key: int) -> bool:
        return key in self._matchers

    def add(self, key: int, prototype: Prototype, end_ids: Iterable[int]) -> None:
        """Begin a sequence. Its text may end with any of `end_ids`. A key is never used twice."""
        assert key not in self._matchers, f"key {key} has a matcher already"
        self._matchers[key] = Matcher(prototype, self._vocabulary, end_ids)

    def forget(self, keys: Iterable[int]) -> None:
        for key in keys:
            self._matchers.pop(key, None)

    def advance(self, key: int, token_id: int) -> None:
        """Follow a sequence by the token that it sampled. Unknown keys are ignored: their masks are closed."""
        matcher = self._matchers.get(key)
        if matcher is not None:
            started = time.thread_time()
            matcher.advance(token_id)
            matcher.spend(time.thread_time() - started)

    def replay(self, key: int, token_ids: Sequence[int]) -> None:
        """Follow a new sequence by the tokens that it brings."""
        self._matchers[key].replay(token_ids)

    def fill(self, keys: Sequence[int], masks: NDArray[np.int32]) -> None:
        """Write the mask of keys[i] into masks[i]: bit t % 32 of word t // 32 is set if token t may come next.

        `masks` has at least len(keys) rows of `Vocabulary.num_words` int32 words. A key that is unknown, or whose
        sequence cannot go on, gets a closed mask: all zero. `problem` tells why.
        """
        started = time.thread_time()
        for mask, key in zip(masks, keys, strict=False):
            matcher = self._matchers.get(key)
            if matcher is None:
                mask[:] = 0
                continue
            matcher.fill(mask, self._scratch)
            started, before = time.thread_time(), started
            matcher.spend(started - before)
            if matcher.problem:
                mask[:] = 0

    def problem(self, key: int) -> str:
        """Why the masks of a sequence are closed, in one line; empty: they are not, or the sequence is unknown."""
        matcher = self._matchers.get(key)
        return "" if matcher is None else matcher.problem

    def is_complete(self, key: int) -> bool:
        """Whether a sequence's text so far satisfies its constraint."""
        matcher = self._matchers.get(key)
        return matcher is not None and matcher.is_complete()


def _first_line(matcher: LLMatcher) -> str:
    return next(iter(matcher.get_error().splitlines()), "")[:_MAX_PROBLEM_CHARS]


def _words(token_ids: Iterable[int]) -> dict[int, np.int32]:
    """Tokens as the words of a mask that hold them, each with their bits."""
    words: dict[int, int] = {}
    for token_id in token_ids:
        words[token_id // 32] = words.get(token_id // 32, 0) | 1 << token_id % 32
    return {word: np.uint32(bits).view(np.int32) for word, bits in words.items()}
