"""The errors of ringfeed, as one tree, and their codes on the wire.

`ValueError` subclasses are for what a user can mend; the rest report the state of an engine.
"""

from __future__ import annotations


class RingfeedError(Exception):
    """Root of every error that ringfeed raises on purpose. `code` is its name in messages."""

    code = "internal"
    retry_after_s = 0.0  # when the same request is likely to be taken; 0 = nothing is known of that


class ConfigError(RingfeedError, ValueError):
    """A configuration that cannot work. The text names file, key, value and cure."""

    code = "config"


class ModelUnsupported(RingfeedError, ValueError):
    """A model that would run wrongly on paged attention, refused at load."""

    code = "model_unsupported"


class InvalidRequest(RingfeedError, ValueError):
    """A request that is never valid (bad type, out of range, too long, empty), or a misuse of a client."""

    code = "invalid_request"


class QueueFull(RingfeedError):
    """The bounded queue is full; the request was not taken. Try again later: see `retry_after_s`."""

    code = "queue_full"

    def __init__(self, message: str = "", retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineUnavailable(RingfeedError):
    """The engine is starting, draining, or gone; an open request was answered with this."""

    code = "unavailable"


class RequestFailed(RingfeedError):
    """The engine took the request and could not finish it."""

    code = "request_failed"


class LogitsNotFinite(RequestFailed):
    """The model computed NaN or infinity for this request. Other requests are not affected."""

    code = "logits_not_finite"


class ProtocolError(RingfeedError, ValueError):
    """Bytes that are not a message of this protocol."""

    code = "protocol"


class RingError(RingfeedError):
    """A shared-memory ring was used against its rules or does not match its reader."""

    code = "ring"


class RingFull(RingError):
    """The reader has not freed a record in time."""


class LayoutMismatch(RingError):
    """Two processes disagree on the layout, size or epoch of a ring."""


_BY_CODE: dict[str, type[RingfeedError]] = {
    error.code: error
    for error in (
        ConfigError, ModelUnsupported, InvalidRequest, QueueFull, EngineUnavailable, RequestFailed, LogitsNotFinite,
        ProtocolError,
    )
}  # fmt: skip


def error_from_code(code: str, message: str, retry_after_s: float = 0.0) -> RingfeedError:
    """Rebuild the error that a message names; an unknown code gives the root class."""
    error = _BY_CODE.get(code, RingfeedError)(message)
    error.retry_after_s = retry_after_s
    return error
