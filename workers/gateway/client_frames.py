"""Reads and checks the messages of clients. Clients are untrusted: a frame may hold anything."""

from __future__ import annotations

from typing import Final

from ipc.channels import MAX_CLIENT_FRAME_BYTES
from ipc.codec import decode_untrusted
from ipc.errors import InvalidRequest, ProtocolError, RingfeedError
from ipc.messages import (
    MAX_KEPT_KEY_CHARS,
    MAX_REQUEST_ID_CHARS,
    ClientMessage,
    DetokenizeQuery,
    Generate,
    Keep,
    Recall,
    Resume,
    TokenizeQuery,
)
from ipc.sampling_params import SamplingParams

MAX_FRAMES: Final = 2  # read of one message; the others are dropped unread. A REQ socket sends two
MAX_ERROR_CHARS: Final = 1_000
MAX_CACHE_SALT_CHARS: Final = 256
MAX_CLOCK_S: Final = 253_370_000_000  # in the year 9998: a date in every time zone


class UnreadableFrame(Exception):
    """The frames of a client are not an acceptable message. `request_id` is the id that they name; "" = none."""

    def __init__(self, request_id: str, error: RingfeedError) -> None:
        super().__init__(str(error))
        self.request_id = request_id
        self.error = error


def read_client_frames(frames: list[bytes]) -> ClientMessage:
    """Decode and check one message; it is complete and consistent afterwards. Raises UnreadableFrame."""
    if len(frames) != 1:
        number = len(frames) if len(frames) < MAX_FRAMES else f"{MAX_FRAMES} or more"
        error = ProtocolError(f"a message must be one frame and not {number}: use a DEALER socket, not a REQ")
        raise UnreadableFrame("", error)
    frame = frames[0]
    if len(frame) > MAX_CLIENT_FRAME_BYTES:
        raise UnreadableFrame(
            "", ProtocolError(f"a message of {len(frame)} bytes is larger than {MAX_CLIENT_FRAME_BYTES} bytes")
        )
    try:
        message: ClientMessage = decode_untrusted(frame, ClientMessage)
        _check(message)
    except (ProtocolError, InvalidRequest) as error:
        raise UnreadableFrame(_request_id(frame), error) from None
    return message


def _check(message: ClientMessage) -> None:
    if isinstance(message, Generate | TokenizeQuery | DetokenizeQuery | Keep | Recall):
        _check_length("request_id", message.request_id, MAX_REQUEST_ID_CHARS)
    if isinstance(message, Keep | Recall):
        _check_length("key", message.key, MAX_KEPT_KEY_CHARS)
    if isinstance(message, Generate | TokenizeQuery):
        _check_prompt(message)
    elif isinstance(message, DetokenizeQuery):
        _check_token_ids(message.token_ids)


def _check_length(name: str, text: str, max_chars: int) -> None:
    if not 1 <= len(text) <= max_chars:
        raise InvalidRequest(f"{name} must have 1 to {max_chars} characters")


def _check_prompt(message: Generate | TokenizeQuery) -> None:
    inputs = {"prompt": message.prompt, "chat": message.chat, "token_ids": message.token_ids}
    given = [name for name, value in inputs.items() if value is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise InvalidRequest(f"exactly one of prompt, chat and token_ids must be given, not {found}")
    if message.token_ids is not None:
        _check_token_ids(message.token_ids)
    if not isinstance(message, Generate):
        return
    if not (message.prompt or message.token_ids or (message.chat is not None and message.chat.messages)):
        raise InvalidRequest(f"{given[0]} is empty")
    if len(message.cache_salt) > MAX_CACHE_SALT_CHARS:
        raise InvalidRequest(f"cache_salt must have at most {MAX_CACHE_SALT_CHARS} characters")
    if message.clock_s is not None and not 0 <= message.clock_s <= MAX_CLOCK_S:
        raise InvalidRequest(f"clock_s ({message.clock_s}) must be a Unix time, from 0 to {MAX_CLOCK_S}")
    if message.resume is not None:
        _check_resume(message.resume, message.params)


def _check_resume(resume: Resume, params: SamplingParams) -> None:
    num_samples, max_tokens = len(resume.samples), params.max_tokens
    if num_samples != params.n:
        raise InvalidRequest(f"resume.samples has {num_samples} entries: it must have one for each of n ({params.n})")
    if all(sample.has_ended for sample in resume.samples):
        raise InvalidRequest("resume: every sample has ended, so nothing is left to generate")
    if resume.num_suspected < 0:
        raise InvalidRequest(f"resume.num_suspected ({resume.num_suspected}) must be at least 0")
    for index, sample in enumerate(resume.samples):
        name = f"resume.samples[{index}]"
        if sample.num_chars < 0:
            raise InvalidRequest(f"{name}.num_chars ({sample.num_chars}) must be at least 0")
        _check_token_ids(sample.token_ids, f"{name}.token_ids")
        num_tokens = sample.num_tokens
        if max_tokens is not None and num_tokens >= max_tokens and not sample.has_ended:
            raise InvalidRequest(
                f"{name} has {num_tokens} tokens and has not ended; max_tokens ({max_tokens}) leaves no room for one "
                "more"
            )


def _check_token_ids(token_ids: bytes, name: str = "token_ids") -> None:
    if len(token_ids) % 4:
        raise InvalidRequest(f"{name} must be int32 values: {len(token_ids)} bytes are not a multiple of 4")


def _request_id(frame: bytes) -> str:
    """The request id of an unacceptable message, if the answer can name it; else ""."""
    try:
        request_id: object = decode_untrusted(frame, dict).get("request_id", "")
    except ProtocolError:
        return ""
    return request_id if isinstance(request_id, str) and len(request_id) <= MAX_REQUEST_ID_CHARS else ""
