"""Parameters that name tokens: checked against the vocabulary and encoded as long values."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipc.errors import InvalidRequest
from ipc.long_values import LONG_COLUMNS, long_columns_of, long_layout, places
from ipc.records import NO_TOKEN, StepShape
from ipc.sampling_params import MAX_BAD_WORD_CHARS, MAX_BAD_WORDS, SamplingParams
from tests.unit.workers.text.tools import byte_fallback_tokenizer, byte_level_tokenizer
from workers.tokenizer.token_parameters import NOTHING_ASKED, TokenParameters

TOKENIZER = byte_level_tokenizer()
VOCAB_SIZE = TOKENIZER.get_vocab_size() + 5  # rows that pad the embedding
SHAPE = StepShape(4, 16, 64, 4, VOCAB_SIZE)
PARAMETERS = TokenParameters(TOKENIZER, SHAPE, (7, 8))


def columns(params: SamplingParams, parameters: TokenParameters = PARAMETERS) -> dict[str, Any]:
    """The long columns of a request, by name, as the GPU process finds them."""
    words = np.frombuffer(parameters.check(params).long_values, "<i4")
    found = {}
    end = min(1, len(words))
    for field, start in places(long_layout(SHAPE), long_columns_of(words)):
        end = start + field.num_items
        found[field.path[0]] = words[start:end].view(field.dtype).tolist()
    assert end == len(words)
    assert set(found) <= set(LONG_COLUMNS)
    return found


def used(values: list[int]) -> list[int]:
    return [value for value in values if value != NO_TOKEN]


def allowed(mask: list[int]) -> set[int]:
    bits = np.unpackbits(np.array(mask, "<i4").view(np.uint8), bitorder="little")
    assert not bits[VOCAB_SIZE:].any()
    return set(bits.nonzero()[0].tolist())


def sequences(flat: list[int]) -> list[tuple[int, ...]]:
    """Bad words, each ended by NO_TOKEN."""
    found, word = [], []
    for token_id in flat:
        if token_id != NO_TOKEN:
            word.append(token_id)
        elif word:
            found.append(tuple(word))
            word = []
    assert not word, "the last word has no end"
    return found


def test_a_request_that_names_no_tokens_asks_for_nothing() -> None:
    assert PARAMETERS.check(SamplingParams(temperature=1.0, min_tokens=3)) is NOTHING_ASKED
    assert PARAMETERS.check(SamplingParams(logit_bias={})) is NOTHING_ASKED


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"stop_token_ids": [1, VOCAB_SIZE]}, "stop_token_ids"),
        ({"allowed_token_ids": [1, VOCAB_SIZE]}, "allowed_token_ids"),
        ({"logit_bias": {1: 0.5, VOCAB_SIZE: 1}}, "logit_bias"),
        ({"logprob_token_ids": [VOCAB_SIZE]}, "logprob_token_ids"),
    ],
)
def test_an_id_beyond_the_vocabulary_is_refused_by_field_and_id(params: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{field} holds {VOCAB_SIZE}; the model's ids are 0 to {VOCAB_SIZE - 1}"):
        PARAMETERS.check(SamplingParams(**params))


@settings(max_examples=100, deadline=None)
@given(
    ids=st.none() | st.sets(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=20),
    bias=st.dictionaries(st.integers(0, VOCAB_SIZE - 1), st.integers(-100, 100), max_size=5),
    logprobs=st.none() | st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=64),
)
def test_only_the_columns_that_are_asked_for_are_encoded(ids: Any, bias: dict[int, int], logprobs: Any) -> None:
    params = SamplingParams(allowed_token_ids=ids and list(ids), logit_bias=bias, logprob_token_ids=logprobs)
    found = columns(params)
    assert ("token_mask" in found, "bias_ids" in found, "logprob_ids" in found) == (
        ids is not None, bool(bias), logprobs is not None,
    )  # fmt: skip
    if ids is not None:
        assert allowed(found["token_mask"]) == ids
    if bias:
        assert dict(zip(used(found["bias_ids"]), found["bias_values"], strict=False)) == bias
    if logprobs is not None:
        assert used(found["logprob_ids"]) == list(dict.fromkeys(logprobs))


def vllm_sequences(tokenizer: Any, words: list[str]) -> list[list[int]]:
    """What the documentation of vLLM says: a word counts with and without a space in front of it, the former only if
    it begins with another token and has as many tokens."""
    found: list[list[int]] = []
    for word in words:
        plain = tokenizer.encode(word.lstrip(), add_special_tokens=False).ids
        spaced = tokenizer.encode(" " + word.lstrip(), add_special_tokens=False).ids
        found += [plain, spaced] if plain[0] != spaced[0] and len(plain) == len(spaced) else [plain]
    return found


@settings(max_examples=100, deadline=None)
@given(
    words=st.lists(
        st.sampled_from(["the", " the", "fox", "quick brown", "x", "!", "🙂", "</s>"]) | st.text("the fox", min_size=1),
        min_size=1,
        max_size=6,
    ),
    make=st.sampled_from([byte_level_tokenizer, byte_fallback_tokenizer]),
)
def test_bad_words_are_sequences_with_and_without_a_space(words: list[str], make: Any) -> None:
    tokenizer = make()
    parameters = TokenParameters(tokenizer, SHAPE, None)
    if any(not word.strip() for word in words):
        with pytest.raises(InvalidRequest, match="which has no tokens"):
            parameters.check(SamplingParams(bad_words=words))
        return
    found = columns(SamplingParams(bad_words=words), parameters)
    expected = {tuple(ids) for ids in vllm_sequences(tokenizer, words)}
    masked = set(range(VOCAB_SIZE)) - allowed(found["token_mask"]) if "token_mask" in found else set()
    assert masked == {ids[0] for ids in expected if len(ids) == 1}
    assert set(sequences(found.get("bad_words", []))) == {ids for ids in expected if len(ids) > 1}


def test_a_bad_word_of_one_token_is_taken_from_the_allowed_ids() -> None:
    the, fox = (TOKENIZER.encode(text, add_special_tokens=False).ids[0] for text in ("the", " fox"))
    params = SamplingParams(allowed_token_ids=[the, fox], bad_words=["the"])
    assert allowed(columns(params)["token_mask"]) == {fox}
    with pytest.raises(InvalidRequest, match="allowed_token_ids and bad_words together leave no token"):
        PARAMETERS.check(SamplingParams(allowed_token_ids=[the], bad_words=["the"]))


def test_too_many_tokens_of_bad_words_are_refused_with_their_number_and_at_once() -> None:
    words = [f"{i:03}" + "🙂z" * 100 for i in range(MAX_BAD_WORDS)]
    assert max(map(len, words)) <= MAX_BAD_WORD_CHARS
    started = time.perf_counter()
    with pytest.raises(InvalidRequest, match=r"bad_words has \d+ tokens .* at most 2048 .*: give fewer or shorter"):
        PARAMETERS.check(SamplingParams(bad_words=words))
    assert time.perf_counter() - started < 1


def test_a_bad_word_with_a_token_that_the_model_lacks_is_refused() -> None:
    small = TokenParameters(TOKENIZER, StepShape(4, 16, 64, 4, 100), None)
    with pytest.raises(InvalidRequest, match=r"bad_words holds 'the', whose token \d+ the model does not have"):
        small.check(SamplingParams(bad_words=["the"]))


def test_a_thinking_budget_needs_thinking_tokens() -> None:
    asked = PARAMETERS.check(SamplingParams(thinking_token_budget=0))
    assert (asked.thinking, asked.long_values) == ((7, 8), b"")
    assert PARAMETERS.check(SamplingParams(logit_bias={1: 1})).thinking is None
    with pytest.raises(InvalidRequest, match=r"thinking_token_budget \(5\) needs tokens that begin and end thinking"):
        TokenParameters(TOKENIZER, SHAPE, None).check(SamplingParams(thinking_token_budget=5))
