"""Inputs: prompts and options of a client's caller. Checks them and encodes the request. Knows no sockets."""

from __future__ import annotations

import math
import reprlib
import secrets
import time
import uuid
from array import array
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, Final, TypeAlias, TypedDict, cast

from ipc.channels import MAX_CLIENT_FRAME_BYTES
from ipc.chat import EncodedChat
from ipc.codec import encode
from ipc.errors import InvalidRequest, ProtocolError
from ipc.messages import (
    MAX_KEPT_KEY_CHARS,
    MAX_REQUEST_ID_CHARS,
    DetokenizeQuery,
    Generate,
    Keep,
    Message,
    Recall,
    TokenizeQuery,
)
from ipc.sampling_params import MAX_SEED, SamplingParams
from ipc.scheduling_params import DEFAULT_SCHEDULING, SchedulingParams
from pipeline.client.chat_input import Chat, encode_chat

# A text; a chat, or only its messages {"role": ..., "content": ...}; or token ids, as a list or a 1-d integer array.
Prompt: TypeAlias = str | Chat | Sequence[Mapping[str, Any]] | Sequence[int]

assert array("i").itemsize == 4, "token ids travel as 32-bit integers"


class SchedulingOptions(TypedDict, total=False):
    """Keyword arguments of a request that the scheduler reads: fields of SchedulingParams, or all of them at once."""

    priority: int
    tenant: str
    deadline_s: float | None
    queue_timeout_s: float | None
    scheduling: SchedulingParams


def new_id() -> str:
    """A request id that no other client draws."""
    return uuid.uuid4().hex


def generate_message(
    request_id: str,
    prompt: Prompt,
    params: SamplingParams,
    stream: bool,
    cache_salt: str = "",
    scheduling: SchedulingParams = DEFAULT_SCHEDULING,
) -> Generate:
    """The request, with a seed and the present time. Raises InvalidRequest if no engine would accept it."""
    if not isinstance(params, SamplingParams):
        raise InvalidRequest(f"params ({params!r}) must be SamplingParams")
    if not isinstance(request_id, str) or not 1 <= len(request_id) <= MAX_REQUEST_ID_CHARS:
        raise InvalidRequest(
            f"request_id ({reprlib.repr(request_id)}) must be a string of 1 to {MAX_REQUEST_ID_CHARS} characters"
        )
    if not isinstance(cache_salt, str):
        raise InvalidRequest(f"cache_salt ({cache_salt!r}) must be a string")
    fields = _prompt_fields(prompt)
    if not any(fields.values()):
        raise InvalidRequest("prompt is empty")
    return Generate(
        request_id=request_id,
        # Every attempt has this seed: a resumed request continues with the same random numbers.
        params=params if params.seed is not None else params.with_seed(secrets.randbelow(MAX_SEED + 1)),
        stream=stream,
        cache_salt=cache_salt,
        scheduling=scheduling,
        clock_s=time.time(),
        **fields,
    )


def client_frame(message: Message, large_part: str) -> bytes:
    """The encoded message. Raises InvalidRequest, which names `large_part`, if the engine would refuse its size."""
    try:
        return encode(message, max_bytes=MAX_CLIENT_FRAME_BYTES)
    except ProtocolError as error:
        raise InvalidRequest(f"{large_part} is too large: {error}") from None


def tokenize_frame(request_id: str, prompt: Prompt, add_special_tokens: bool, scheduling: SchedulingParams) -> bytes:
    """The encoded query for the tokens of a prompt, which may be empty. Raises InvalidRequest."""
    if not isinstance(add_special_tokens, bool):
        raise InvalidRequest(f"add_special_tokens ({reprlib.repr(add_special_tokens)}) must be True or False")
    message = TokenizeQuery(
        request_id=request_id, add_special_tokens=add_special_tokens, scheduling=scheduling, **_prompt_fields(prompt)
    )
    return client_frame(message, "prompt")


def detokenize_frame(
    request_id: str, token_ids: Sequence[int], skip_special_tokens: bool, scheduling: SchedulingParams
) -> bytes:
    """The encoded query for the text of tokens. Raises InvalidRequest."""
    if not isinstance(skip_special_tokens, bool):
        raise InvalidRequest(f"skip_special_tokens ({reprlib.repr(skip_special_tokens)}) must be True or False")
    name, kinds = "token_ids", "a list of token ids"
    if _is_array(token_ids, name):
        token_ids = cast(Any, token_ids).tolist()
    elif not isinstance(token_ids, Sequence) or isinstance(token_ids, str | bytes | bytearray | memoryview):
        raise InvalidRequest(f"{name} must be {kinds}, not {type(token_ids).__name__}")
    message = DetokenizeQuery(
        request_id=request_id,
        token_ids=_token_id_bytes(token_ids, name, kinds),
        skip_special_tokens=skip_special_tokens,
        scheduling=scheduling,
    )
    return client_frame(message, name)


def keep_frame(request_id: str, key: str, value: bytes) -> bytes:
    """The encoded message that keeps a value. Raises InvalidRequest."""
    if not isinstance(value, bytes):
        raise InvalidRequest(f"value must be bytes, not {type(value).__name__}")
    return client_frame(Keep(request_id=request_id, key=_checked_key(key), value=value), "value")


def recall_frame(request_id: str, key: str, *, forget: bool) -> bytes:
    """The encoded message that reads or forgets a value. Raises InvalidRequest."""
    return encode(Recall(request_id=request_id, key=_checked_key(key), forget=forget))


def _checked_key(key: object) -> str:
    if not isinstance(key, str) or not 1 <= len(key) <= MAX_KEPT_KEY_CHARS:
        raise InvalidRequest(f"key ({reprlib.repr(key)}) must be a string of 1 to {MAX_KEPT_KEY_CHARS} characters")
    return key


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
    """The prompts of a batch and the parameters of each. Raises InvalidRequest if `prompts` is not a list of prompts.

    A single prompt is refused too, because each of its letters, token ids or messages would become a prompt.
    """
    refusal = f"prompts ({reprlib.repr(prompts)}) must be a list of prompts"
    if isinstance(prompts, str | bytes | bytearray | memoryview | Mapping) or not isinstance(prompts, Iterable):
        raise InvalidRequest(f"{refusal}; use generate for one prompt")
    prompts = list(prompts)
    if prompts and all(isinstance(prompt, Integral | Mapping) for prompt in prompts):
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
            f"{name} ({reprlib.repr(timeout_s)}) must be a number of seconds that is not negative, or None for no limit"
        )
    return None if timeout_s == math.inf else float(timeout_s)


_PROMPT_KINDS: Final = "a string, a Chat, a list of chat messages or a list of token ids"


class _PromptFields(TypedDict, total=False):
    """The field of Generate or TokenizeQuery that holds the prompt."""

    prompt: str
    chat: EncodedChat
    token_ids: bytes


def _prompt_fields(prompt: Prompt) -> _PromptFields:
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if isinstance(prompt, Chat):
        return {"chat": encode_chat(prompt)}
    if _is_array(prompt, "prompt"):
        return {"token_ids": _token_id_bytes(cast(Any, prompt).tolist(), "prompt", _PROMPT_KINDS)}
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray | memoryview):
        raise InvalidRequest(f"prompt must be {_PROMPT_KINDS}, not {type(prompt).__name__}")
    if prompt and isinstance(prompt[0], Mapping):
        return {"chat": encode_chat(Chat(cast(Any, prompt)))}
    return {"token_ids": _token_id_bytes(cast(Sequence[int], prompt), "prompt", _PROMPT_KINDS)}


def _is_array(value: object, name: str) -> bool:
    """A numpy array or something like it, without importing numpy."""
    if not hasattr(value, "dtype") or not hasattr(value, "tolist"):
        return False
    if getattr(value, "ndim", None) != 1 or getattr(value.dtype, "kind", "") not in ("i", "u"):
        raise InvalidRequest(f"{name} is an array: it must be 1-dimensional and hold integers")
    return True


def _token_id_bytes(token_ids: Sequence[int], name: str, kinds: str) -> bytes:
    try:
        if bool in map(type, token_ids):  # Python takes them for 0 and 1
            raise TypeError
        packed = array("i", token_ids)
    except TypeError:
        raise InvalidRequest(f"{name} must be {kinds}; this list holds something else") from None
    except OverflowError:
        raise InvalidRequest(f"{name}: token ids must lie in [0, 2**31)") from None
    if packed and min(packed) < 0:
        raise InvalidRequest(f"{name}: token id {min(packed)} is negative")
    return packed.tobytes()
