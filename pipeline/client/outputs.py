"""What a client sends and gets, in Python's own types: prompts in, outputs out. Knows no sockets."""

from __future__ import annotations

import math
import reprlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, Final, Literal, TypeAlias, TypedDict, cast

import msgspec

from ipc.channels import MAX_CLIENT_FRAME_BYTES
from ipc.codec import MAX_ITEMS, encode
from ipc.errors import InvalidRequest, ProtocolError
from ipc.messages import MAX_REQUEST_ID_CHARS, ChatMessage, FinishReason, Generate, TokenLogprobs
from ipc.sampling_params import SamplingParams
from ipc.scheduling_params import DEFAULT_SCHEDULING, SchedulingParams

# A text; a chat, as messages or {"role": ..., "content": ...}; or token ids, as a list or a 1-d integer array.
Prompt: TypeAlias = str | Sequence[ChatMessage] | Sequence[Mapping[str, str]] | Sequence[int]

assert array("i").itemsize == 4, "token ids travel as 32-bit integers"


class SchedulingOptions(TypedDict, total=False):
    """Keyword arguments of a request that the scheduler reads: fields of SchedulingParams, or all of them at once."""

    priority: int
    tenant: str
    deadline_s: float | None
    queue_timeout_s: float | None
    scheduling: SchedulingParams


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


def generate_frame(
    request_id: str,
    prompt: Prompt,
    params: SamplingParams,
    stream: bool,
    cache_salt: str = "",
    scheduling: SchedulingParams = DEFAULT_SCHEDULING,
) -> bytes:
    """The encoded request. Raises InvalidRequest for what no engine would take."""
    if not isinstance(params, SamplingParams):
        raise InvalidRequest(f"params ({params!r}) must be SamplingParams")
    if not isinstance(request_id, str) or not 1 <= len(request_id) <= MAX_REQUEST_ID_CHARS:
        raise InvalidRequest(
            f"request_id ({reprlib.repr(request_id)}) must be a string of 1 to {MAX_REQUEST_ID_CHARS} characters"
        )
    text: str | None = None
    chat: list[ChatMessage] | None = None
    token_ids: bytes | None = None
    if isinstance(prompt, str):
        text = prompt
    elif _is_array(prompt):
        token_ids = _token_id_bytes(cast(Any, prompt).tolist())
    elif not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray | memoryview):
        raise InvalidRequest(f"prompt must be {_PROMPT_KINDS}, not {type(prompt).__name__}")
    elif prompt and isinstance(prompt[0], ChatMessage | Mapping):
        if len(prompt) > MAX_ITEMS:
            raise InvalidRequest(f"prompt is a chat of {len(prompt)} messages, at most {MAX_ITEMS} are taken")
        chat = [_chat_message(message) for message in prompt]
    else:
        token_ids = _token_id_bytes(cast(Sequence[int], prompt))
    if len(cast(Any, prompt)) == 0:
        raise InvalidRequest("prompt is empty")
    if not isinstance(cache_salt, str):
        raise InvalidRequest(f"cache_salt ({cache_salt!r}) must be a string")
    message = Generate(
        request_id=request_id,
        params=params,
        prompt=text,
        chat=chat,
        token_ids=token_ids,
        stream=stream,
        cache_salt=cache_salt,
        scheduling=scheduling,
    )
    try:
        return encode(message, max_bytes=MAX_CLIENT_FRAME_BYTES)
    except ProtocolError as error:
        raise InvalidRequest(f"prompt is too large: {error}") from None


def scheduling_params(options: SchedulingOptions) -> SchedulingParams:
    """The scheduling parameters of a request's keyword arguments. Raises InvalidRequest."""
    if "scheduling" not in options:
        return SchedulingParams(**cast(Any, options))
    scheduling = options["scheduling"]
    if not isinstance(scheduling, SchedulingParams):
        raise InvalidRequest(f"scheduling ({reprlib.repr(scheduling)}) must be SchedulingParams")
    if others := sorted(options.keys() - {"scheduling"}):
        raise InvalidRequest(f"scheduling and {', '.join(others)} are both given: put {others[0]} into the first")
    return scheduling


def batch_of(
    prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams]
) -> tuple[list[Prompt], list[SamplingParams]]:
    """The prompts of a batch and the parameters of each. Raises InvalidRequest if `prompts` is not a batch.

    It also refuses a single prompt (a text, token ids, a chat), whose letters, ids or messages would become prompts.
    """
    refusal = f"prompts ({reprlib.repr(prompts)}) must be a list of prompts"
    if isinstance(prompts, str | bytes | bytearray | memoryview | Mapping) or not isinstance(prompts, Iterable):
        raise InvalidRequest(f"{refusal}; use generate for one prompt")
    prompts = list(prompts)
    if prompts and all(isinstance(prompt, Integral | ChatMessage | Mapping) for prompt in prompts):
        raise InvalidRequest(f"{refusal}; this is one prompt: use generate for it")
    if isinstance(params, SamplingParams):
        return prompts, [params] * len(prompts)
    if not isinstance(params, Iterable):
        raise InvalidRequest(f"params ({reprlib.repr(params)}) must be SamplingParams, or a list of them")
    params = list(params)
    if len(params) != len(prompts):
        raise InvalidRequest(f"{len(params)} params for {len(prompts)} prompts: give one, or one for each")
    return prompts, params


def checked_timeout(timeout_s: object, name: str = "timeout_s") -> float | None:
    """A time-out in seconds; None = none. Raises InvalidRequest."""
    if timeout_s is None:
        return None
    if not isinstance(timeout_s, int | float) or isinstance(timeout_s, bool) or not timeout_s >= 0:
        raise InvalidRequest(
            f"{name} ({reprlib.repr(timeout_s)}) must be a number of seconds that is not negative, or None to wait "
            "for ever"
        )
    return None if timeout_s == math.inf else float(timeout_s)


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


_PROMPT_KINDS: Final = "a string, a list of chat messages or a list of token ids"


def _is_array(prompt: object) -> bool:
    """A numpy array or something like it, without importing numpy."""
    if not hasattr(prompt, "dtype") or not hasattr(prompt, "tolist"):
        return False
    if getattr(prompt, "ndim", None) != 1 or getattr(prompt.dtype, "kind", "") not in ("i", "u"):
        raise InvalidRequest("prompt is an array, but not a 1-dimensional one of integers")
    return True


def _token_id_bytes(token_ids: Sequence[int]) -> bytes:
    try:
        if bool in map(type, token_ids):  # to Python they are 0 and 1
            raise TypeError
        packed = array("i", token_ids)
    except TypeError:
        raise InvalidRequest(f"prompt must be {_PROMPT_KINDS}; something in this list is none of them") from None
    except OverflowError:
        raise InvalidRequest("prompt: token ids must lie in [0, 2**31)") from None
    if packed and min(packed) < 0:
        raise InvalidRequest(f"prompt: token id {min(packed)} is negative")
    return packed.tobytes()


def _chat_message(message: object) -> ChatMessage:
    try:
        return msgspec.convert(msgspec.to_builtins(message), ChatMessage)
    except (msgspec.ValidationError, TypeError) as error:
        raise InvalidRequest(f'chat message must be {{"role": text, "content": text}}: {error}') from None
