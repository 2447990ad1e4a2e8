"""The status of every error, and its body in the form of OpenAI's and of Anthropic's API."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from ipc.errors import EngineUnavailable, InvalidRequest, ProtocolError, QueueFull, RingfeedError, TokensExcluded

_TOO_LONG: Final = "context_length_exceeded"
_PARAM: Final = re.compile(r"([a-z_]+)(?:\[[^\]]*\]|\.\w+)*(?:: | \(| is | has | must | cannot )")
_OPENAI_TYPES: Final = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout_error", 413: "invalid_request_error", 429: "rate_limit_error",
    431: "invalid_request_error", 503: "service_unavailable_error",
}  # fmt: skip
_ANTHROPIC_TYPES: Final = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout_error", 413: "request_too_large", 429: "rate_limit_error",
    431: "invalid_request_error", 503: "overloaded_error",
}  # fmt: skip


class HttpError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP, 400 to 599.
        message: one line: the fault, the value, and the cure.
        param: the field of the request that is at fault; None = not one field.
        code: OpenAI's name of the error, for clients that look for it.
        retry_after_s: when the same request may succeed; 0 = unknown.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float = 0.0,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the answer: `Retry-After` in whole seconds, as HTTP requires."""
        return {"retry-after": str(math.ceil(self.retry_after_s))} if self.retry_after_s > 0 else {}


def http_error(error: Exception) -> HttpError | None:
    """The answer for an error that ringfeed raises on purpose; None for any other, which is our own fault."""
    if isinstance(error, HttpError):
        return error
    if not isinstance(error, RingfeedError):
        return None
    message = str(error)
    if isinstance(error, InvalidRequest | TokensExcluded):
        found = _PARAM.match(message)
        code = _TOO_LONG if "longest sequence of this engine" in message else None
        return HttpError(400, message, param=found[1] if found else None, code=code)
    if isinstance(error, QueueFull):
        return HttpError(429, message, code="queue_full", retry_after_s=max(error.retry_after_s, 1.0))
    if isinstance(error, EngineUnavailable | ProtocolError):
        return HttpError(503, message, code="unavailable", retry_after_s=max(error.retry_after_s, 1.0))
    return HttpError(500, message, code=error.code)


def openai_body(error: HttpError) -> dict[str, Any]:
    """{"error": {...}} as OpenAI's clients read it."""
    kind = _OPENAI_TYPES.get(error.status, "server_error")
    message = error.message
    if error.code == _TOO_LONG:  # LiteLLM and others look for this phrase, and not at the code
        message = f"this model's maximum context length is exceeded: {message}"
    return {"error": {"message": message, "type": kind, "param": error.param, "code": error.code}}


def anthropic_body(error: HttpError) -> dict[str, Any]:
    """{"type": "error", ...} as Anthropic's clients read it."""
    kind = _ANTHROPIC_TYPES.get(error.status, "api_error")
    message = error.message
    if error.code == _TOO_LONG:  # Anthropic's errors have no code, so its clients look for these phrases
        by_room = "max_tokens (" in message
        message = (
            f"{'input length and `max_tokens` exceed context limit' if by_room else 'prompt is too long'}: {message}"
        )
    return {"type": "error", "error": {"type": kind, "message": message}}


@dataclass(frozen=True)
class Dialect:
    """How one API writes errors.

    Args:
        error_body: the body of an answer that is an error.
        error_event: what a stream sends when its request fails after its first event.
    """

    error_body: Callable[[HttpError], dict[str, Any]]
    error_event: Callable[[HttpError], bytes]


def _openai_event(error: HttpError) -> bytes:
    return b"data: " + msgspec.json.encode(openai_body(error)) + b"\n\ndata: [DONE]\n\n"


def _anthropic_event(error: HttpError) -> bytes:
    return b"event: error\ndata: " + msgspec.json.encode(anthropic_body(error)) + b"\n\n"


OPENAI: Final = Dialect(openai_body, _openai_event)
ANTHROPIC: Final = Dialect(anthropic_body, _anthropic_event)
