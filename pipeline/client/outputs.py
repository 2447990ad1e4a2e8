"""Outputs: the results that a client's caller gets, in Python's own types. Knows no sockets."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ipc.messages import FinishReason, TokenLogprobs


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache

    @property
    def total(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class TokenLogprob(msgspec.Struct, frozen=True):
    """Log-probability of one sampled token, and of the likeliest ones at its place, likeliest first."""

    token_id: int
    logprob: float
    top: dict[int, float]


class Completion(msgspec.Struct, kw_only=True):
    """One sample of a request, whole. Its fields are those of Output."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None = None


class Output(msgspec.Struct, kw_only=True):
    """News of a request.

    Of a stream, each Output has the text and tokens of sample `index` that are new since that sample's one before
    (several steps' worth if the consumer is slower than the engine). A sample's last one has a `finish_reason`; the
    request's last one is also `finished` and has the `usage`. Without streaming one Output has everything: its
    `completions` are the n samples in order, and its other fields those of the first.

    A stop string is never in `text`; `token_ids` may end with the tokens that completed it. `logprobs` has one entry
    per token id if the request asked for them.
    """

    request_id: str
    text: str
    token_ids: list[int]
    index: int = 0
    finished: bool = False
    finish_reason: FinishReason | None = None
    usage: Usage | None = None  # of a finished request; its prompt counts once
    completions: list[Completion] = []
    error: str | None = None  # with finish reason "error"
    logprobs: list[TokenLogprob] | None = None

    @classmethod
    def failed(cls, request_id: str, error: str) -> Output:
        """The one Output of a request that failed."""
        return cls(request_id=request_id, text="", token_ids=[], finished=True, finish_reason="error", error=error)


def token_logprobs(token_ids: Sequence[int], parts: Sequence[TokenLogprobs]) -> list[TokenLogprob]:
    """Unpack consecutive columns; together they have one row per token id."""
    rows: list[tuple[float, dict[int, float]]] = []
    for part in parts:
        n = part.num_top
        ids = memoryview(part.top_ids).cast("i").tolist()
        values = memoryview(part.top_logprobs).cast("f").tolist()
        for i, logprob in enumerate(memoryview(part.logprobs).cast("f").tolist()):
            rows.append((logprob, dict(zip(ids[i * n : (i + 1) * n], values[i * n : (i + 1) * n], strict=True))))
    return [TokenLogprob(token, logprob, top) for token, (logprob, top) in zip(token_ids, rows, strict=True)]
