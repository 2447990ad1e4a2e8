"""Checks a request's parameters that name tokens, and encodes those that are long values (`ipc/long_values.py`).

Owns bad words as token sequences, after vLLM's `SamplingParams.update_from_tokenizer`. Knows no prompts.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from ipc.errors import InvalidRequest
from ipc.long_values import MAX_BAD_WORD_IDS, encode_long_values
from ipc.records import NO_TOKEN, StepShape
from ipc.sampling_params import SamplingParams

_ID_FIELDS: Final = ("stop_token_ids", "allowed_token_ids", "logit_bias", "logprob_token_ids")


class Asked(NamedTuple):
    """What a request's parameters ask of the GPU process, besides the columns of an admission."""

    long_values: bytes = b""
    thinking: tuple[int, int] | None = None


NOTHING_ASKED: Final = Asked()


class TokenParameters:
    """Checks parameters against one model's vocabulary.

    Args:
        thinking: the model's tokens that begin and end thinking; None: it has none.
    """

    def __init__(self, tokenizer: Tokenizer, shape: StepShape, thinking: tuple[int, int] | None) -> None:
        self._tokenizer = tokenizer
        self._shape = shape
        self._thinking = thinking

    def check(self, params: SamplingParams) -> Asked:
        """Raises InvalidRequest, naming the field, for a token that the model does not have."""
        for field in _ID_FIELDS:
            if token_ids := getattr(params, field):
                self._check_ids(field, token_ids)
        columns = self._columns(params)
        thinking = None
        if params.thinking_token_budget is not None:
            thinking = self._thinking
            if thinking is None:
                raise InvalidRequest(
                    f"thinking_token_budget ({params.thinking_token_budget}) needs tokens that begin and end thinking, "
                    "and the model's folder names none: leave it out"
                )
        if not columns and thinking is None:
            return NOTHING_ASKED
        return Asked(encode_long_values(self._shape, columns), thinking)

    def _check_ids(self, field: str, token_ids: Iterable[int]) -> None:
        vocab_size = self._shape.vocab_size
        for token_id in token_ids:
            if token_id >= vocab_size:
                raise InvalidRequest(f"{field} holds {token_id}; the model's ids are 0 to {vocab_size - 1}")

    def _columns(self, params: SamplingParams) -> dict[str, Any]:
        """The long columns that a request asks for, by name."""
        columns: dict[str, Any] = {}
        bad = self._bad_sequences(params.bad_words) if params.bad_words else []
        single = [token_ids[0] for token_ids in bad if len(token_ids) == 1]
        if params.allowed_token_ids is not None or single:
            columns["token_mask"] = self._mask(params.allowed_token_ids, single)
        if params.logit_bias:
            columns["bias_ids"] = list(params.logit_bias)
            columns["bias_values"] = list(params.logit_bias.values())
        longer = [i for token_ids in bad if len(token_ids) > 1 for i in (*token_ids, NO_TOKEN)]
        if len(longer) > MAX_BAD_WORD_IDS:
            raise InvalidRequest(
                f"bad_words has {len(longer)} tokens in its texts of several tokens, one more counted for each text; "
                f"at most {MAX_BAD_WORD_IDS} are allowed: give fewer or shorter texts"
            )
        if longer:
            columns["bad_words"] = longer
        if params.logprob_token_ids:
            columns["logprob_ids"] = params.logprob_token_ids
        return columns

    def _mask(self, allowed_ids: list[int] | None, bad_ids: list[int]) -> np.ndarray[Any, np.dtype[np.int32]]:
        """One bit for each token that may be sampled, [mask_words]."""
        allowed = np.full(32 * self._shape.mask_words, allowed_ids is None)
        allowed[self._shape.vocab_size :] = False
        if allowed_ids is not None:
            allowed[allowed_ids] = True
        allowed[bad_ids] = False
        if not allowed.any():
            raise InvalidRequest("allowed_token_ids and bad_words together leave no token that may be sampled")
        return np.packbits(allowed, bitorder="little").view("<i4")

    def _bad_sequences(self, words: list[str]) -> list[tuple[int, ...]]:
        """The token sequences of bad words, each once.

        A word's spaces in front do not count. With one space in front, it is a second sequence if it has as many tokens
        and another first one: so it is found within a text, too.
        """
        texts = [prefix + word.lstrip() for word in words for prefix in ("", " ")]
        ids = [tuple(found.ids) for found in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        sequences = []
        for word, plain, spaced in zip(words, ids[::2], ids[1::2], strict=True):
            if not plain:
                raise InvalidRequest(f"bad_words holds {reprlib.repr(word)}, which has no tokens: leave it out")
            sequences.append(plain)
            if len(spaced) == len(plain) and spaced[0] != plain[0]:
                sequences.append(spaced)
            if (highest := max(*plain, *spaced)) >= self._shape.vocab_size:
                raise InvalidRequest(
                    f"bad_words holds {reprlib.repr(word)}, whose token {highest} the model does not have: leave it out"
                )
        return list(dict.fromkeys(sequences))
