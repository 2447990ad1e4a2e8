"""Sampling parameters: one immutable struct per request, checked where it is made and again at the gateway.

To add a parameter: a field here, a column of the same name in `ipc/records.py` (AdmittedColumns), a function in the
sampler or in the adjustment stage and its counterpart in the kernels, a test row.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from hashlib import blake2b
from typing import Annotated, Any, Final, Literal, Self

import msgspec

from ipc.codec import BoundedList
from ipc.errors import InvalidRequest
from ipc.parameter_checks import check_fields, is_int, is_ints, is_real
from ipc.structured_outputs import StructuredOutputs

MAX_STOP_TOKEN_IDS: Final = 16  # per request, besides the model's own end-of-sequence ids
MAX_STOP_STRINGS: Final = 16
MAX_STOP_STRING_CHARS: Final = 256
MAX_LOGPROBS: Final = 20
MAX_LOGPROB_TOKEN_IDS: Final = 64
MAX_LOGIT_BIAS: Final = 1_024  # entries
MAX_ALLOWED_TOKEN_IDS: Final = 16_384
MAX_BAD_WORDS: Final = 256
MAX_BAD_WORD_CHARS: Final = 256
MAX_SAMPLES: Final = 64  # of one prompt
MAX_SEED: Final = 2**63 - 1
MIN_TEMPERATURE: Final = 0.001  # lower values are greedy
_INT32: Final = 2**31

LogprobsMode = Literal["raw_logprobs", "processed_logprobs"]
LogitBias = Annotated[dict[int, float], msgspec.Meta(max_length=MAX_LOGIT_BIAS)]


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """How one request is sampled and when it ends. Every field is per request and applies in a mixed batch.

    Args:
        max_tokens: most tokens to generate, 1 to 2**31 - 1; None (default) = up to the model's length.
        temperature: 0 (the default) or less than 0.001 = greedy; otherwise, up to 100, logits are divided by it.
        top_k: keep the k most likely tokens; 0 or -1 = off.
        top_p: keep the smallest set of tokens whose probability reaches this, in (0, 1]; 1 = off.
        min_p: drop tokens less likely than `min_p` times the likeliest, in [0, 1]; 0 = off.
        repetition_penalty: divides the positive logits of tokens that the prompt or the output holds, and multiplies
            their negative ones; in (0, 10], 1 = off.
        presence_penalty: is subtracted from the logits of tokens that the output holds; in [-2, 2], 0 = off.
        frequency_penalty: is subtracted once for each occurrence in the output; in [-2, 2], 0 = off.
        logit_bias: token id to a number in [-100, 100] that is added to its logit; at most 1,024 entries.
        allowed_token_ids: only these tokens may be sampled, at most 16,384; None = all.
        bad_words: at most 256 texts that the output must not hold: the last of a text's tokens is not sampled behind
            the others. A text also counts with a space in front, if that changes only its first token.
        min_tokens: so many tokens are generated before an end-of-sequence id, a stop token or a stop string ends the
            sequence. The model's length ends it even then.
        thinking_token_budget: after so many tokens of thinking, the model's end-of-thinking token is sampled; -1 or
            None = no limit. Needs a model whose folder names its thinking tokens.
        structured_outputs: the grammar that the output follows, see StructuredOutputs.
        seed: 0 to 2**63 - 1. The same seed, prompt and parameters give the same tokens, whatever other requests run.
            None (default) = the gateway draws one.
        stop: at most 16 strings of 1 to 256 characters; the text ends before the first of them. They may name special
            tokens.
        include_stop_str_in_output: the text ends behind the stop string, not before it; and the token that ends the
            sequence has its text.
        stop_token_ids: at most 16 token ids that end the sequence, besides the model's end-of-sequence ids.
        ignore_eos: do not end at the end-of-sequence ids of model and tokenizer (`stop_token_ids` still apply).
        skip_special_tokens: special tokens of the output have no text. False = their text is their name.
        spaces_between_special_tokens: False = no space stands between two tokens that were added to the vocabulary,
            special ones among them. Only few tokenizers (WordPiece) write such spaces, and only if skip_special_tokens
            is False.
        truncate_prompt_tokens: keep only the last so many tokens of the prompt; -1 = as many as the model's length
            leaves room for beside max_tokens; None = a longer prompt is an error. A text keeps the special tokens that
            the tokenizer writes in front of it; they count.
        logprobs: None (default) = no log-probabilities; n, from 0 to 20 = those of each sampled token and of the n
            likeliest tokens at its position.
        logprob_token_ids: at most 64 token ids whose log-probabilities are returned at each sampled position, besides
            the sampled token's and those of `logprobs`.
        prompt_logprobs: the same as `logprobs` for the prompt's own tokens, from the second one on. They are always the
            model's own. The whole prompt is computed, without cached blocks.
        logprobs_mode: "raw_logprobs" = the model's own; "processed_logprobs" = after penalties, masks, temperature and
            filters.
        n: samples of the prompt, 1 to 64. Sample 0 equals the result of n = 1; the other samples have their own seeds
            (`of_sample`).

    Names and meanings are those of vLLM's SamplingParams. The order: allowed ids, bad words, bias, min_tokens, thinking
    budget, penalties, structured outputs, temperature, top_k, top_p, min_p. Raises InvalidRequest, naming field and
    value, for anything out of range.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: LogitBias | None = None
    allowed_token_ids: BoundedList[int] | None = None
    bad_words: BoundedList[str] = []
    min_tokens: int = 0
    thinking_token_budget: int | None = None
    structured_outputs: StructuredOutputs | None = None
    seed: int | None = None
    stop: BoundedList[str] = []
    include_stop_str_in_output: bool = False
    stop_token_ids: BoundedList[int] = []
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    logprobs: int | None = None
    logprob_token_ids: BoundedList[int] | None = None
    prompt_logprobs: int | None = None
    logprobs_mode: LogprobsMode = "raw_logprobs"
    n: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            self._set(stop=[self.stop])
        for name in ("stop", "stop_token_ids", "bad_words"):
            if getattr(self, name) is None:
                self._set(**{name: []})
        if self.thinking_token_budget == -1:
            self._set(thinking_token_budget=None)
        if isinstance(self.logit_bias, Mapping) and len(self.logit_bias) <= MAX_LOGIT_BIAS:
            self._set(logit_bias=_with_int_keys(self.logit_bias))
        check_fields(self, _RULES)
        if self.bad_words:
            self._set(bad_words=list(dict.fromkeys(self.bad_words)))
        if self.logprob_token_ids is not None:
            self._set(logprob_token_ids=list(dict.fromkeys(self.logprob_token_ids)))
        if self.temperature < MIN_TEMPERATURE:
            self._set(temperature=0.0)
        if self.top_k == -1:
            self._set(top_k=0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(f"min_tokens ({self.min_tokens}) is more than max_tokens ({self.max_tokens})")
        if self.structured_outputs is not None and self.ignore_eos:
            raise InvalidRequest(
                "ignore_eos (True) and structured_outputs are both given: a complete answer could not end; leave "
                "ignore_eos out"
            )

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            msgspec.structs.force_setattr(self, name, value)

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens have log-probabilities at each position. None: not even the sampled one."""
        return 0 if self.logprobs is None and self.logprob_token_ids else self.logprobs

    def with_seed(self, seed: int) -> Self:
        """A copy with this seed, from 0 to 2**63 - 1. It is not checked again: the gateway copies each request's."""
        copied = copy.copy(self)
        msgspec.structs.force_setattr(copied, "seed", seed)
        return copied

    def with_special_tokens(self) -> Self:
        """A copy whose output has the text of special tokens."""
        copied = copy.copy(self)
        copied._set(skip_special_tokens=False)
        return copied

    def without_long_values(self) -> Self:
        """These parameters without the fields that travel as long values (`ipc/long_values.py`)."""
        if self.logit_bias is None and self.allowed_token_ids is None and not self.bad_words:
            return self
        copied = copy.copy(self)
        copied._set(logit_bias=None, allowed_token_ids=None, bad_words=[])
        return copied

    def of_sample(self, index: int) -> Self:
        """Parameters with n = 1 whose request generates the same tokens as sample `index` of this request.

        Sample 0 keeps the seed. Each other sample's seed is a hash of the seed and its index, so that samples of
        neighbouring seeds share no random numbers. Raises InvalidRequest without a seed, or for an index out of range.
        """
        if not isinstance(index, int) or not 0 <= index < self.n:
            raise InvalidRequest(f"index ({index!r}) must lie in [0, {self.n}): the request has no other samples")
        seed = self.seed
        if seed is None:
            raise InvalidRequest("seed (None) must be set: the seeds of samples derive from it")
        if index:
            mixed = blake2b(seed.to_bytes(8, "little") + index.to_bytes(8, "little"), digest_size=8)
            seed = int.from_bytes(mixed.digest(), "little") & MAX_SEED
        return msgspec.structs.replace(self, seed=seed, n=1)


def _with_int_keys(bias: Mapping[Any, Any]) -> dict[Any, Any]:
    """JSON has only text as keys."""
    return {int(key) if _is_number(key) else key: bias[key] for key in bias}


def _is_number(key: Any) -> bool:
    """Whether a key is the text of a number. Longer texts are no token ids, and Python refuses to convert them."""
    return isinstance(key, str) and len(key) <= 20 and key.isascii() and key.isdigit()


def _is_penalty(value: Any) -> bool:
    return is_real(value) and bool(-2 <= value <= 2)


def _is_bias(value: object) -> bool:
    return isinstance(value, dict) and len(value) <= MAX_LOGIT_BIAS and is_ints(list(value), 0, _INT32) and all(
        is_real(number) and -100 <= number <= 100 for number in value.values()
    )  # fmt: skip


def _is_texts(value: object, max_texts: int, max_chars: int) -> bool:
    return isinstance(value, list) and len(value) <= max_texts and all(
        isinstance(text, str) and 0 < len(text) <= max_chars for text in value
    )  # fmt: skip


def _is_ids(value: object, max_ids: int, min_ids: int = 0) -> bool:
    return isinstance(value, list) and min_ids <= len(value) <= max_ids and is_ints(value, 0, _INT32)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


_TRUTH: Final = (_is_bool, "must be true or false")
_PENALTY: Final = (_is_penalty, "must lie in [-2, 2] (0 = off)")
_LOGPROBS: Final = (
    lambda v: v is None or is_int(v, 0, MAX_LOGPROBS + 1), f"must be an integer in [0, {MAX_LOGPROBS}], or None",
)  # fmt: skip

# Of each field: whether a value is valid, and the rule as an error message states it.
_RULES: Final = {
    "max_tokens": (lambda v: v is None or is_int(v, 1, _INT32), "must be an integer in [1, 2**31), or None"),
    "temperature": (
        lambda v: is_real(v) and 0 <= v <= 100,
        f"must lie in [0, 100]; below {MIN_TEMPERATURE} it is greedy",
    ),
    "top_k": (lambda v: is_int(v, -1, _INT32), "must be an integer in [-1, 2**31) (0 or -1 = off)"),
    "top_p": (lambda v: is_real(v) and 0 < v <= 1, "must lie in (0, 1] (1 = off)"),
    "min_p": (lambda v: is_real(v) and 0 <= v <= 1, "must lie in [0, 1] (0 = off)"),
    "repetition_penalty": (lambda v: is_real(v) and 0 < v <= 10, "must lie in (0, 10] (1 = off)"),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "logit_bias": (
        lambda v: v is None or _is_bias(v),
        f"must map at most {MAX_LOGIT_BIAS} token ids to numbers in [-100, 100]",
    ),
    "allowed_token_ids": (
        lambda v: v is None or _is_ids(v, MAX_ALLOWED_TOKEN_IDS, 1),
        f"must be a list of 1 to {MAX_ALLOWED_TOKEN_IDS} integers in [0, 2**31), or None",
    ),
    "bad_words": (
        lambda v: _is_texts(v, MAX_BAD_WORDS, MAX_BAD_WORD_CHARS),
        f"must be a list of at most {MAX_BAD_WORDS} strings of 1 to {MAX_BAD_WORD_CHARS} characters each",
    ),
    "min_tokens": (lambda v: is_int(v, 0, _INT32), "must be an integer in [0, 2**31)"),
    "thinking_token_budget": (
        lambda v: v is None or is_int(v, 0, _INT32), "must be an integer in [0, 2**31), or None",
    ),
    "structured_outputs": (
        lambda v: v is None or isinstance(v, StructuredOutputs), "must be StructuredOutputs, or None",
    ),
    "seed": (lambda v: v is None or is_int(v, 0, MAX_SEED + 1), "must be an integer in [0, 2**63), or None"),
    "stop": (
        lambda v: _is_texts(v, MAX_STOP_STRINGS, MAX_STOP_STRING_CHARS),
        f"must be a list of at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_STRING_CHARS} characters each",
    ),
    "include_stop_str_in_output": _TRUTH,
    "stop_token_ids": (
        lambda v: _is_ids(v, MAX_STOP_TOKEN_IDS),
        f"must be a list of at most {MAX_STOP_TOKEN_IDS} integers in [0, 2**31)",
    ),
    "ignore_eos": _TRUTH,
    "skip_special_tokens": _TRUTH,
    "spaces_between_special_tokens": _TRUTH,
    "truncate_prompt_tokens": (
        lambda v: v is None or (is_int(v, -1, _INT32) and v != 0), "must be -1, an integer in [1, 2**31), or None",
    ),
    "logprobs": _LOGPROBS,
    "logprob_token_ids": (
        lambda v: v is None or _is_ids(v, MAX_LOGPROB_TOKEN_IDS, 1),
        f"must be a list of 1 to {MAX_LOGPROB_TOKEN_IDS} integers in [0, 2**31), or None",
    ),
    "prompt_logprobs": _LOGPROBS,
    "logprobs_mode": (
        lambda v: v in ("raw_logprobs", "processed_logprobs"), 'must be "raw_logprobs" or "processed_logprobs"',
    ),
    "n": (lambda v: is_int(v, 1, MAX_SAMPLES + 1), f"must be an integer in [1, {MAX_SAMPLES}]"),
}  # fmt: skip
