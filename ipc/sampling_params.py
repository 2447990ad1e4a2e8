"""Sampling parameters: one immutable struct per request, checked where it is made and again at the gateway.

To add a parameter: a field here, a column of the same name in `ipc/records.py` (AdmittedColumns), a function in the
sampler, a test row.
"""

from __future__ import annotations

import copy
import math
import reprlib
from hashlib import blake2b
from typing import Final, Self

import msgspec

from ipc.codec import BoundedList
from ipc.errors import InvalidRequest

MAX_STOP_TOKEN_IDS: Final = 16  # per request, besides the model's own end-of-sequence ids
MAX_STOP_STRINGS: Final = 16
MAX_STOP_STRING_CHARS: Final = 256
MAX_LOGPROBS: Final = 20
MAX_SAMPLES: Final = 64  # of one prompt
MAX_SEED: Final = 2**63 - 1
MIN_TEMPERATURE: Final = 0.001  # lower values would be greedy in effect


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """How one request is sampled and when it ends. Every field is per request and applies in a mixed batch.

    Args:
        max_tokens: most tokens to generate, 1 to 2**31 - 1; None (default) = up to the model's length.
        temperature: 0 = greedy (the default); otherwise, from 0.001 to 100, logits are divided by it.
        top_k: keep the k most likely tokens; 0 = off.
        top_p: keep the smallest set of tokens whose probability reaches this, in (0, 1]; 1 = off.
        min_p: drop tokens less likely than `min_p` times the likeliest, in [0, 1]; 0 = off.
        seed: 0 to 2**63 - 1. The same seed, prompt and parameters give the same tokens, whatever other requests run.
            None (default) = the gateway draws one.
        stop: at most 16 strings of 1 to 256 characters; the text ends before the first of them. They may name special
            tokens.
        stop_token_ids: at most 16 token ids that end the sequence, besides the model's end-of-sequence ids.
        ignore_eos: do not end at the end-of-sequence ids of model and tokenizer (`stop_token_ids` still apply).
        logprobs: None (default) = no log-probabilities; n, from 0 to 20 = those of each sampled token and of the n
            likeliest tokens at its position.
        n: samples of the prompt, 1 to 64. Sample 0 equals the result of n = 1; the other samples have their own seeds
            (`of_sample`).

    Filters apply in the order temperature, top_k, top_p, min_p. Log-probabilities are the model's own, before any of
    these. Raises InvalidRequest, naming field and value, for anything out of range.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: BoundedList[str] = []
    stop_token_ids: BoundedList[int] = []
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        def check(ok: bool, field: str, rule: str) -> None:
            if not ok:
                raise InvalidRequest(f"{field} ({reprlib.repr(getattr(self, field))}) {rule}")

        def is_int(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        def is_real(value: object) -> bool:
            return is_int(value) or (isinstance(value, float) and math.isfinite(value))

        check(self.max_tokens is None or (is_int(self.max_tokens) and 1 <= self.max_tokens < 2**31),
              "max_tokens", "must be an integer in [1, 2**31), or None")  # fmt: skip
        check(is_real(self.temperature) and (self.temperature == 0 or MIN_TEMPERATURE <= self.temperature <= 100),
              "temperature", f"must be 0 (greedy) or lie in [{MIN_TEMPERATURE}, 100]")  # fmt: skip
        check(is_int(self.top_k) and 0 <= self.top_k < 2**31, "top_k", "must be an integer in [0, 2**31) (0 = off)")
        check(is_real(self.top_p) and 0 < self.top_p <= 1, "top_p", "must lie in (0, 1] (1 = off)")
        check(is_real(self.min_p) and 0 <= self.min_p <= 1, "min_p", "must lie in [0, 1] (0 = off)")
        check(self.seed is None or (is_int(self.seed) and 0 <= self.seed <= MAX_SEED),
              "seed", "must be an integer in [0, 2**63), or None")  # fmt: skip
        check(isinstance(self.stop, list) and len(self.stop) <= MAX_STOP_STRINGS
              and all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_STRING_CHARS for s in self.stop),
              "stop", f"must be a list of at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_STRING_CHARS} "
              "characters each")  # fmt: skip
        check(isinstance(self.stop_token_ids, list) and len(self.stop_token_ids) <= MAX_STOP_TOKEN_IDS
              and all(is_int(t) and 0 <= t < 2**31 for t in self.stop_token_ids),
              "stop_token_ids", f"must be a list of at most {MAX_STOP_TOKEN_IDS} integers in [0, 2**31)")  # fmt: skip
        check(isinstance(self.ignore_eos, bool), "ignore_eos", "must be true or false")
        check(self.logprobs is None or (is_int(self.logprobs) and 0 <= self.logprobs <= MAX_LOGPROBS),
              "logprobs", f"must be an integer in [0, {MAX_LOGPROBS}], or None")  # fmt: skip
        check(is_int(self.n) and 1 <= self.n <= MAX_SAMPLES, "n", f"must be an integer in [1, {MAX_SAMPLES}]")

    def with_seed(self, seed: int) -> Self:
        """A copy with this seed, from 0 to 2**63 - 1. It is not checked again: the gateway copies each request's."""
        copied = copy.copy(self)
        msgspec.structs.force_setattr(copied, "seed", seed)
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
