"""What a grammar process answers, without sockets and rings: every order of compiling, releasing and filling."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import pytest

from ipc.errors import ModelUnsupported
from ipc.messages import Compile, Compiled, MatcherFailed
from ipc.records import NO_TOKEN
from ipc.structured_outputs import StructuredOutputs
from tests.unit.workers.grammar.grammar_tools import END, encode, matchers_of, vocabulary
from workers.grammar.compiler import MAX_TOKEN_S
from workers.grammar.core import GrammarCore
from workers.grammar.matchers import MEAN_TOKEN_S, REPLAYED_TOKEN_S
from workers.grammar.vocabulary import Vocabulary

DEADLINE_S = 10.0
WORD = StructuredOutputs(choice=["def", "class"])


class Driven:
    """A core whose notifications are waited for."""

    def __init__(self, load: Callable[[], Vocabulary] = vocabulary) -> None:
        self._bell = threading.Event()
        self.core = GrammarCore(load, self._bell.set, compile_timeout_s=5.0)

    def answers(self, num: int) -> list[Compiled]:
        """Wait for so many answers."""
        found = self.core.take_answers()
        while len(found) < num:
            assert self._bell.wait(DEADLINE_S), f"{found} are all the answers that came"
            self._bell.clear()
            found += self.core.take_answers()
        return found

    def fill(self, *wanted: tuple[int, int]) -> tuple[list[list[int]], list[MatcherFailed]]:
        """The tokens that each mask allows, and the failures. `wanted` are (key, newest token)."""
        masks = np.full((len(wanted) + 1, vocabulary().num_words), 0x5A5A5A5A, np.int32)
        failures = self.core.fill([key for key, _ in wanted], [token_id for _, token_id in wanted], masks)
        assert (masks[-1] == 0x5A5A5A5A).all(), "a mask that is not asked for was written"
        bits = np.unpackbits(masks[:-1].view(np.uint8), axis=1, bitorder="little")
        return [np.flatnonzero(row).tolist() for row in bits], failures


@pytest.fixture
def driven() -> Iterator[Driven]:
    made = Driven()
    yield made
    if made.core._pool is not None:
        made.core._pool.close()


def compile_of(key: int, spec: StructuredOutputs = WORD, num_samples: int = 1) -> Compile:
    return Compile(key=key, num_samples=num_samples, spec=spec, end_ids=[END])


def test_samples_of_one_request_follow_the_grammar_each_for_itself(driven: Driven) -> None:
    driven.core.compile(compile_of(1, num_samples=2))
    assert driven.answers(1) == [Compiled(key=1)]
    assert driven.core.num_matchers == 2
    [define], [cls, *_] = encode("def"), encode("class")
    (first, second), failures = driven.fill((1, NO_TOKEN), (2, NO_TOKEN))
    assert first == second
    assert {define, cls} <= set(first)
    assert not failures
    (first, second), failures = driven.fill((1, define), (2, NO_TOKEN))
    assert first == [END]
    assert cls in second
    assert not failures


def test_a_mask_for_no_sequence_is_closed_and_nobody_hears_of_it(driven: Driven) -> None:
    driven.core.compile(compile_of(1))
    driven.answers(1)
    (nobody, first), failures = driven.fill((0, NO_TOKEN), (1, NO_TOKEN))
    assert nobody == []
    assert first
    assert not failures


def test_an_illegal_token_closes_the_masks_of_its_sequence_and_is_reported_once(driven: Driven) -> None:
    driven.core.compile(compile_of(1, num_samples=2))
    driven.answers(1)
    illegal = encode("zip")[0]
    (first, second), failures = driven.fill((1, illegal), (2, NO_TOKEN))
    assert first == []
    assert second
    [failure] = failures
    assert failure.key == 1
    assert f"token {illegal}" in failure.reason
    (first,), failures = driven.fill((1, illegal))
    assert first == []
    assert not failures


def test_an_unknown_sequence_gets_a_closed_mask_and_is_not_reported(driven: Driven) -> None:
    assert driven.fill((7, 5)) == ([[]], [])
    assert driven.core.knows_some([0]), "its mask does not matter"
    assert not driven.core.knows_some([7])
    driven.core.compile(compile_of(1))
    driven.answers(1)
    assert driven.fill((7, 5)) == ([[]], [])
    assert [driven.core.knows_some(keys) for keys in ([7], [7, 1])] == [False, True]


def test_a_grammar_that_cannot_be_compiled_is_answered_with_the_error(driven: Driven) -> None:
    driven.core.compile(compile_of(1, StructuredOutputs(json='{"type": 7}')))
    [answer] = driven.answers(1)
    assert (answer.key, answer.error_code) == (1, "invalid_request")
    assert "structured_outputs.json cannot be used" in answer.error_message
    assert driven.core.num_matchers == 0


def test_released_sequences_are_forgotten_before_and_after_their_grammar_is_compiled(driven: Driven) -> None:
    driven.core.compile(compile_of(1, num_samples=3))
    driven.core.release([2])
    assert driven.answers(1) == [Compiled(key=1)]
    assert driven.core.num_matchers == 2
    driven.core.release([1, 3, 99])
    assert driven.core.num_matchers == 0
    driven.core.compile(compile_of(5, num_samples=2))
    driven.core.release([5, 6])
    [answer] = driven.answers(1)
    assert answer.key == 5
    assert answer.error_code, "a request whose sequences have all ended is answered too, once"
    driven.core.compile(compile_of(8))
    assert driven.answers(1) == [Compiled(key=8)]
    assert driven.core.num_matchers == 1


def test_sequences_go_on_behind_the_tokens_that_they_bring(driven: Driven) -> None:
    [cls, *rest], illegal = encode("class"), encode("zip")
    known = [np.array(token_ids, np.int32).tobytes() for token_ids in ([cls], [], [], [cls, *illegal], [])]
    driven.core.compile(msgspec.structs.replace(compile_of(1, num_samples=5), known=known))
    driven.core.release([3])
    assert driven.answers(1) == [Compiled(key=1)]
    masks, failures = driven.fill(*((key, NO_TOKEN) for key in (1, 2, 4, 5)))
    assert masks[0] == ([rest[0]] if rest else [END])
    assert cls in masks[1] == masks[3]
    assert masks[2] == []
    assert [(failure.key, f"token {illegal[0]}" in failure.reason) for failure in failures] == [(4, True)]
    assert driven.core.num_matchers == 4
    [*masks, _], _ = driven.fill((1, rest[0] if rest else END), (2, cls), (0, NO_TOKEN))
    assert masks == [[END], [rest[0]] if rest else [END]]


def test_the_time_that_known_tokens_take_is_bounded_and_does_not_count_later(monkeypatch: pytest.MonkeyPatch) -> None:
    word = encode("def")[:1] * 40
    for slowness_s, is_refused in ((MEAN_TOKEN_S / 4, True), (REPLAYED_TOKEN_S * 1.2, False)):
        now = [0.0]

        def thread_time(now: list[float] = now, slowness_s: float = slowness_s) -> float:
            now[0] += slowness_s  # every second look is at the end of a token
            return now[0]

        monkeypatch.setattr("workers.grammar.matchers.time.thread_time", thread_time)
        matchers = matchers_of(StructuredOutputs(regex=r"[\s\S]*"))
        matchers.replay(1, word * (1 + round(MAX_TOKEN_S / MEAN_TOKEN_S)))
        assert ("takes too much time" in matchers.problem(1)) == is_refused
        if not is_refused:
            matchers._matchers[1].spend(MAX_TOKEN_S * 0.99)
            assert not matchers.problem(1), "the sequence has its whole credit after that"


def test_requests_wait_for_the_vocabulary_which_is_loaded_once() -> None:
    may_load, loads = threading.Event(), []

    def load() -> Vocabulary:
        loads.append(1)
        assert may_load.wait(DEADLINE_S)
        return vocabulary()

    driven = Driven(load)
    driven.core.start_loading()
    driven.core.compile(compile_of(1))
    driven.core.compile(compile_of(2))
    driven.core.release([2])
    assert [answer.key for answer in driven.core.take_answers()] == [2]
    may_load.set()
    assert driven.answers(1) == [Compiled(key=1)]
    assert loads == [1]


@pytest.mark.parametrize(("error", "words"), [
    (ModelUnsupported("no tokenizer here"), "no tokenizer here"), (OSError("x"), "cannot be read (OSError)"),
])  # fmt: skip
def test_a_vocabulary_that_cannot_be_loaded_ends_every_request(
    error: Exception, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    def load() -> Vocabulary:
        raise error

    driven = Driven(load)
    driven.core.compile(compile_of(1))
    [answer] = driven.answers(1)
    assert (answer.key, answer.error_code) == (1, "model_unsupported")
    assert words in answer.error_message
    driven.core.compile(compile_of(2))
    assert [answer.key for answer in driven.answers(1)] == [2]
