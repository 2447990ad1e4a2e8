"""The masks of sequences: which tokens they allow, where they end, and when they are closed."""

from __future__ import annotations

import json
from typing import Final

import numpy as np
import pytest

from ipc.structured_outputs import StructuredOutputs
from tests.unit.workers.grammar.grammar_tools import (
    END,
    SYSTEM,
    VOCAB_SIZE,
    allowed,
    compiled,
    encode,
    follow,
    masks_of,
    matchers_of,
    tokenizer,
    vocabulary,
)
from workers.grammar.compiler import Compiler
from workers.grammar.matchers import Matchers
from workers.grammar.vocabulary import Vocabulary

NUMBER: Final = StructuredOutputs(regex="[0-9]{1,3}")
PAIR: Final = StructuredOutputs(json={"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]})
DIGIT: Final = tokenizer().token_to_id("7")


def test_the_end_is_allowed_exactly_when_the_text_is_complete() -> None:
    matchers = matchers_of(StructuredOutputs(regex="ab|abcd"))
    ends = []
    for token_id in [tokenizer().token_to_id(each) for each in "abcd"]:
        ends.append(END in allowed(matchers))
        assert matchers.is_complete(1) == ends[-1]
        matchers.advance(1, token_id)
    assert ends == [False, False, True, False]
    assert list(allowed(matchers)) == [END]


def test_a_text_that_has_ended_allows_only_the_end() -> None:
    matchers = matchers_of(NUMBER)
    matchers.advance(1, DIGIT)
    matchers.advance(1, END)
    assert list(allowed(matchers)) == [END]
    assert matchers.is_complete(1)


def test_each_sequence_has_its_own_ends_even_ordinary_tokens() -> None:
    seven, eight = DIGIT, tokenizer().token_to_id("8")
    matchers = matchers_of(NUMBER, end_ids=(SYSTEM, seven))
    assert not {seven, SYSTEM, END} & set(allowed(matchers))  # no text that ends here would be complete
    matchers.advance(1, eight)
    assert {seven, SYSTEM} < set(allowed(matchers))
    assert END not in allowed(matchers)
    matchers.advance(1, seven)
    assert list(allowed(matchers)) == sorted({seven, SYSTEM})


def test_end_ids_beyond_the_vocabulary_are_ignored() -> None:
    matchers = matchers_of(NUMBER, end_ids=(END, VOCAB_SIZE, 10**9, -1))
    matchers.advance(1, DIGIT)
    assert END in allowed(matchers)


def test_an_illegal_token_closes_the_mask_of_its_sequence_only() -> None:
    matchers = matchers_of(NUMBER, num_sequences=2)
    matchers.advance(1, tokenizer().token_to_id("x"))
    masks = masks_of(matchers, 1, 2)
    assert not masks[0].any()
    assert masks[1].any()
    assert "does not fit the grammar" in matchers.problem(1)
    assert matchers.problem(2) == ""
    matchers.advance(1, DIGIT)
    assert not masks_of(matchers, 1).any()


@pytest.mark.parametrize(
    ("tokens", "problem"),
    [([END], f"token {END} ends a text that is not complete"), ([DIGIT, END, DIGIT], "follows the end of the text")],
)
def test_a_token_around_the_end_closes_the_mask(tokens: list[int], problem: str) -> None:
    matchers = matchers_of(NUMBER)
    for token_id in tokens:
        matchers.advance(1, token_id)
    assert not masks_of(matchers, 1).any()
    assert problem in matchers.problem(1)
    assert not matchers.is_complete(1)


def test_unknown_and_forgotten_keys_have_closed_masks() -> None:
    matchers = matchers_of(NUMBER, num_sequences=2)
    matchers.forget([2, 77])
    matchers.advance(2, DIGIT)
    masks = masks_of(matchers, 2, 0, 1, 99)
    assert [bool(mask.any()) for mask in masks] == [False, False, True, False]
    assert matchers.problem(2) == ""
    assert len(matchers) == 1


def test_samples_of_one_request_are_independent() -> None:
    matchers = matchers_of(PAIR, num_sequences=3)
    assert follow(matchers, '{"a": "x', key=1)
    assert follow(matchers, '{"a":', key=3)
    assert tokenizer().token_to_id("{") in allowed(matchers, 2)
    fresh = matchers_of(PAIR)
    assert np.array_equal(masks_of(matchers, 2), masks_of(fresh, 1))
    assert not np.array_equal(masks_of(matchers, 1), masks_of(matchers, 3))


def test_a_replayed_sequence_has_the_masks_of_the_one_it_repeats() -> None:
    matchers = matchers_of(PAIR)
    token_ids = encode(json.dumps({"a": 'é"\n'}))
    for i, token_id in enumerate(token_ids):
        matchers.advance(1, token_id)
        matchers.add(2 + i, compiled(PAIR), [END])
        for known in token_ids[: i + 1]:
            matchers.advance(2 + i, known)
        one, other = masks_of(matchers, 1, 2 + i)
        assert np.array_equal(one, other)


def test_free_strings_contain_no_special_token() -> None:
    matchers = matchers_of(PAIR)
    assert follow(matchers, '{"a": "free')
    assert not set(range(5)) & set(allowed(matchers))
    assert len(allowed(matchers)) > 3_000


@pytest.mark.parametrize("size", [VOCAB_SIZE + 1, VOCAB_SIZE + 40, VOCAB_SIZE - 1, VOCAB_SIZE - 33, VOCAB_SIZE - 64])
def test_tokens_that_the_model_or_the_tokenizer_does_not_have_are_never_allowed(size: int) -> None:
    other = Vocabulary(tokenizer(), size, END)
    assert other.num_words == -(-size // 32)
    matchers = Matchers(other)
    spec = StructuredOutputs(regex="(?s:.*)")
    matchers.add(1, Compiler(other).compile(spec), [END])
    masks = np.full((1, other.num_words), -1, np.int32)
    matchers.fill([1], masks)
    ours = set(np.flatnonzero(np.unpackbits(masks[0].view(np.uint8), bitorder="little")))
    theirs = set(allowed(matchers_of(spec)))
    assert ours == {token_id for token_id in theirs if token_id < size}
    assert theirs


def test_masks_fit_rows_of_a_larger_record() -> None:
    record = np.full((4, vocabulary().num_words), 7, np.int32)
    matchers = matchers_of(NUMBER, num_sequences=2)
    matchers.fill([1, 2], record[1:])
    assert np.array_equal(record[1], record[2])
    assert (record[0] == 7).all()
    assert (record[3] == 7).all()


def test_a_grammar_that_needs_the_end_token_in_the_middle_is_closed_with_the_reason() -> None:
    matchers = matchers_of(StructuredOutputs(grammar=f'start: "a" <[{SYSTEM}]> "b"'), end_ids=(END, SYSTEM))
    assert follow(matchers, "a")
    assert not masks_of(matchers, 1).any()
    assert "only tokens that end the text" in matchers.problem(1)
