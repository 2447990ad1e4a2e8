"""Outputs: the results that a client's caller gets, in Python's own types. Knows no sockets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from ipc.messages import FinishReason, TokenLogprobs


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """The state of an engine and its limits.

    Args:
        state: "starting", "ready", "draining" (it finishes open requests and then ends) or "failed".
        detail: the stage of a starting engine, or the reason why an engine failed; "" otherwise.
        protocol_version: version of the messages between client and engine; both sides must have the same.
        model: name of the model: the folder's name, or the hub id.
        max_model_len: most tokens, prompt and output together, of one sequence.
        max_open_requests: most requests that one client may have open, each of `n` samples counted.
    """

    state: Literal["starting", "ready", "draining", "failed"]
    detail: str
    protocol_version: int
    model: str
    max_model_len: int
    max_open_requests: int


class Usage(msgspec.Struct, frozen=True):
    """Number of tokens of one request.

    Args:
        prompt_tokens: tokens of the prompt, counted once for all samples.
        completion_tokens: generated tokens of all samples together.
        num_cached_tokens: tokens of the prompt that the engine found in its prefix cache.
    """

    prompt_tokens: int
    completion_tokens: int
    num_cached_tokens: int = 0

    @property
    def total(self) -> int:
        """Prompt and completion tokens together."""
        return self.prompt_tokens + self.completion_tokens


class TokenLogprob(msgspec.Struct, frozen=True):
    """Log-probability (natural logarithm) of one generated token and of the likeliest tokens at its position.

    Args:
        token_id: the generated token.
        logprob: its log-probability before temperature and filters.
        top: token id to log-probability, likeliest first; `SamplingParams.logprobs` says how many.
    """

    token_id: int
    logprob: float
    top: dict[int, float]


class Completion(msgspec.Struct, kw_only=True):
    """One whole sample of a request.

    Args:
        index: position of the sample among the request's `n`, from 0.
        text: the generated text, without the stop string that ended it.
        token_ids: the generated tokens; they may end with the tokens of a stop string.
        finish_reason: "stop", "length", "cancelled", "deadline" or "queue_timeout".
        logprobs: one entry per token if the request asked for them; otherwise None.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None = None


class Output(msgspec.Struct, kw_only=True):
    """The result of a request, or the newest part of a stream.

    Without streaming, one Output has everything: `completions` are the n samples in order, and the other fields are
    those of sample 0. Each Output of a stream has the text and tokens of one sample since that sample's previous
    Output: several steps' worth if the caller is slower than the engine.

    Args:
        request_id: the id that the caller gave, or a generated one.
        text: generated text, without the stop string that ended it.
        token_ids: generated tokens; they may end with the tokens of a stop string.
        index: the sample that `text` and `token_ids` belong to, from 0.
        finished: True in the last Output of the request.
        finish_reason: None while the sample goes on; then "stop", "length", "cancelled", "deadline",
            "queue_timeout", or "error" (only from `generate_batch`).
        usage: tokens of the whole request, in its last Output; otherwise None.
        completions: all samples of a request without streaming; empty in a stream.
        error: the text of the error with finish reason "error"; otherwise None.
        logprobs: one entry per token id if the request asked for them; otherwise None.
    """

    request_id: str
    text: str
    token_ids: list[int]
    index: int = 0
    finished: bool = False
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    completions: list[Completion] = []
    error: str | None = None
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
