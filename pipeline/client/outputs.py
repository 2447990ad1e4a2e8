"""Outputs: the results that a client's caller gets, in Python's own types. Knows no sockets."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import Mapping, Sequence
from typing import Final, Literal

import msgspec

from ipc.messages import FinishReason, PromptLogprobs, PromptTokens, RequestTimes, Stats, TokenBytes, TokenLogprobs
from ipc.messages import Health as HealthMessage

_TOKENS_AT_ONCE: Final = 262_144  # take about 10 ms


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """The state of an engine and its limits.

    Args:
        state: "starting", "ready", "recovering" (a process of it is started again; requests wait), "draining" (it
            finishes open requests and then ends) or "failed".
        detail: the stage of a starting engine, what a recovering one waits for, or why an engine failed; else "".
        protocol_version: version of the messages between client and engine; both sides must have the same.
        model: name of the model: the folder's name, or the hub id.
        max_model_len: most tokens, prompt and output together, of one sequence.
        max_open_requests: most requests that one client may have open, each of `n` samples counted.
        model_folder: the folder of the model's files, on the engine's machine.
        chat_template: a file there that replaces the model's own chat templates; None = there is none.
        policy: the scheduler's: `scheduler.policy` of the configuration.
        served_model_names: names that HTTP requests may give as `model`; empty: only `model`.
        tool_parser: how the HTTP server reads calls of tools: `http.tool_parser` of the configuration.
        reasoning_parser: how the HTTP server reads reasoning: `http.reasoning_parser` of the configuration.
    """

    state: Literal["starting", "ready", "recovering", "draining", "failed"]
    detail: str
    protocol_version: int
    model: str
    max_model_len: int
    max_open_requests: int
    model_folder: str = ""
    chat_template: str | None = None
    policy: str = "fcfs"
    served_model_names: list[str] = []
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"

    @classmethod
    def of(cls, answer: HealthMessage) -> Health:
        """From the engine's answer."""
        return cls(**{name: getattr(answer, name) for name in cls.__struct_fields__})


class EngineStats(msgspec.Struct, frozen=True):
    """The statistics of every process of an engine, by role.

    Args:
        roles: counters and gauges: {"scheduler": {"num_steps": 12, ...}, "tokenizer.0": {...}, ...}.
        arrays: arrays of 64-bit integers by role and name; `tolist()` gives nested lists.
    """

    roles: dict[str, dict[str, float]]
    arrays: dict[str, dict[str, memoryview]]

    @classmethod
    def of(cls, stats: Stats) -> EngineStats:
        """From the engine's answer."""
        return cls(stats.roles, {
            role: {name: memoryview(array.values).cast("q", array.shape) for name, array in of_role.items()}
            for role, of_role in stats.arrays.items()
        })  # fmt: skip


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
    """Log-probability (natural logarithm) of one token, generated or of the prompt, and of others at its position.

    Args:
        token_id: the token.
        logprob: its log-probability; `SamplingParams.logprobs_mode` says of which logits.
        top: token id to log-probability, likeliest first; `SamplingParams.logprobs` says how many.
        requested: token id to log-probability, in the order of `SamplingParams.logprob_token_ids`.
        token_bytes: token id to the token's own bytes, for this token and those of `top` and `requested`. In a
            byte-level vocabulary, a token can be a part of a character. The bytes of a special token are its name.
    """

    token_id: int
    logprob: float
    top: dict[int, float]
    requested: dict[int, float] = {}
    token_bytes: dict[int, builtins.bytes] = {}

    @property
    def bytes(self) -> builtins.bytes:
        """The bytes of the token."""
        return self.token_bytes.get(self.token_id, b"")

    @property
    def text(self) -> str:
        """The token as text; bytes that are no whole character are U+FFFD."""
        return self.text_of(self.token_id)

    def text_of(self, token_id: int) -> str:
        """One of these tokens as text; "" for any other token."""
        return self.token_bytes.get(token_id, b"").decode("utf-8", "replace")


class TokenizedPrompt(msgspec.Struct, frozen=True):
    """The tokens of a prompt.

    Args:
        token_ids: the ids, in order.
        token_bytes: the bytes of each of these tokens. In a byte-level vocabulary, a token can be a part of a
            character. The bytes of a special token are its name.
    """

    token_ids: list[int]
    token_bytes: list[builtins.bytes]

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return len(self.token_ids)


class Completion(msgspec.Struct, kw_only=True):
    """One whole sample of a request.

    Args:
        index: position of the sample among the request's `n`, from 0.
        text: the generated text, without the stop string that ended it.
        token_ids: the generated tokens; they may end with the tokens of a stop string.
        finish_reason: "stop", "length", "cancelled", "deadline" or "queue_timeout".
        logprobs: one entry per token if the request asked for them; otherwise None.
        times: when the sample passed each stage of the engine; None if it was cancelled before it was sent.
        stop_reason: the one of `SamplingParams.stop` that ended the text; None if none did.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None = None
    times: RequestTimes | None = None
    stop_reason: str | None = None


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
        prompt_logprobs: one entry per token of the prompt if the request asked for them; otherwise None. The first is
            None, because nothing precedes it. In a stream, the entries come before the first token of sample 0 or with
            it. A request that ends before its prompt is computed has only those computed until then.
        times: when the sample passed each stage of the engine, in the Output that has its `finish_reason`; otherwise
            None.
        stop_reason: the one of `SamplingParams.stop` that ended the sample's text; None if none did.
        prompt_usage: tokens of the prompt, without generated ones, in the first Output of a stream that has tokens of
            sample 0; otherwise None.
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
    prompt_logprobs: list[TokenLogprob | None] | None = None
    times: RequestTimes | None = None
    stop_reason: str | None = None
    prompt_usage: Usage | None = None

    @classmethod
    def failed(cls, request_id: str, error: str) -> Output:
        """The one Output of a request that failed."""
        return cls(request_id=request_id, text="", token_ids=[], finished=True, finish_reason="error", error=error)


_WORD_BYTES: Final = 4  # of an int32 or a float32

LogprobPart = tuple[TokenLogprobs, Mapping[int, bytes]]
"""Log-probabilities of consecutive tokens, and the bytes of the tokens that have any."""

PromptPart = tuple[PromptLogprobs, Mapping[int, bytes]]
"""The same of consecutive tokens of a prompt."""


async def tokenized_prompt(answer: PromptTokens) -> TokenizedPrompt:
    """Unpack the answer to a `TokenizeQuery`. A prompt may have millions of tokens, so the event loop goes on."""
    token_ids: list[int] = memoryview(answer.token_ids).cast("i").tolist()
    bytes_of = read_token_bytes(answer.token_bytes)
    token_bytes: list[bytes] = []
    for at in range(0, len(token_ids), _TOKENS_AT_ONCE):
        token_bytes += map(bytes_of.__getitem__, token_ids[at : at + _TOKENS_AT_ONCE])
        await asyncio.sleep(0)
    return TokenizedPrompt(token_ids, token_bytes)


def prompt_logprobs(parts: Sequence[PromptPart]) -> list[TokenLogprob]:
    """Unpack the log-probabilities of a prompt's tokens."""
    rows: list[TokenLogprob] = []
    for part, bytes_of in parts:
        token_ids: list[int] = memoryview(part.token_ids).cast("i").tolist()
        rows += token_logprobs(token_ids, [(part.columns, bytes_of)])
    return rows


def last_rows(part: PromptLogprobs, num: int) -> PromptLogprobs:
    """The log-probabilities of the last `num` tokens of a part."""
    columns = part.columns
    num_extra = len(columns.extra_ids) // _WORD_BYTES

    def tail(values: bytes, width: int) -> bytes:
        return values[len(values) - num * width * _WORD_BYTES :]

    return PromptLogprobs(tail(part.token_ids, 1), TokenLogprobs(
        columns.num_top, tail(columns.logprobs, 1), tail(columns.top_ids, columns.num_top),
        tail(columns.top_logprobs, columns.num_top), columns.extra_ids, tail(columns.extra_logprobs, num_extra),
    ))  # fmt: skip


def token_logprobs(token_ids: Sequence[int], parts: Sequence[LogprobPart]) -> list[TokenLogprob]:
    """Unpack consecutive columns; together they have one row per token id."""
    rows: list[TokenLogprob] = []
    left = iter(token_ids)
    for part, bytes_of in parts:
        top_ids = memoryview(part.top_ids).cast("i").tolist()
        top_values: Sequence[float] = memoryview(part.top_logprobs).cast("f").tolist()
        extra_ids = memoryview(part.extra_ids).cast("i").tolist()
        extra_values: Sequence[float] = memoryview(part.extra_logprobs).cast("f").tolist()
        num_top, num_extra = part.num_top, len(extra_ids)
        for i, logprob in enumerate(memoryview(part.logprobs).cast("f").tolist()):
            token_id = next(left)
            in_row = slice(i * num_top, (i + 1) * num_top)
            top = dict(zip(top_ids[in_row], top_values[in_row], strict=True))
            requested = dict(zip(extra_ids, extra_values[i * num_extra : (i + 1) * num_extra], strict=True))
            named = {key: bytes_of[key] for key in (token_id, *top, *requested) if key in bytes_of}
            rows.append(TokenLogprob(token_id, logprob, top, requested, named))
    assert next(left, None) is None, f"{len(token_ids)} tokens have {len(rows)} log-probabilities"
    return rows


def read_token_bytes(table: TokenBytes | None) -> dict[int, bytes]:
    """The bytes of each token in a table, by id."""
    if table is None:
        return {}
    found, at = {}, 0
    lengths = memoryview(table.lengths).cast("i").tolist()
    for token_id, length in zip(memoryview(table.token_ids).cast("i").tolist(), lengths, strict=True):
        found[token_id] = table.data[at : at + length]
        at += length
    return found
