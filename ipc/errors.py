"""The errors of ringfeed as one tree, and their codes in messages.

    RingfeedError
        ConfigError            (a ValueError)  a configuration that cannot work
        ModelUnsupported       (a ValueError)  a model that the engine refuses to load
        InvalidRequest         (a ValueError)  a request that is never valid, or a misuse of a client
        ProtocolError          (a ValueError)  client and engine do not understand each other
        QueueFull              the engine's queue is full: try again later
        EngineUnavailable      the engine starts, drains or is gone
            Interrupted        a process of the engine died while it worked on the request
        RequestFailed          the engine accepted the request and could not finish it
            LogitsNotFinite    the model computed NaN or infinity
            TokensExcluded     the request's parameters exclude every token
        RingError              inside the engine only: shared memory was misused

The caller can correct a ValueError. The other errors report the state of an engine.
"""

from __future__ import annotations


class RingfeedError(Exception):
    """Root of every error that ringfeed raises on purpose.

    `code` names the error in messages. `retry_after_s` is the number of seconds after which the engine is likely to
    accept the same request; 0 = unknown.
    """

    code = "internal"
    retry_after_s = 0.0


class ConfigError(RingfeedError, ValueError):
    """A configuration that cannot work. The text names the file, the key, the value and the cure."""

    code = "config"


class ModelUnsupported(RingfeedError, ValueError):
    """A model that would run wrongly on paged attention. The GPU process refuses to load it.

    The engine then fails at start. `Pipeline` reports that as EngineUnavailable with this error's text.
    """

    code = "model_unsupported"


class InvalidRequest(RingfeedError, ValueError):
    """A request that is never valid (wrong type, out of range, too long, empty), or misuse of a client or Pipeline."""

    code = "invalid_request"


class QueueFull(RingfeedError):
    """The engine's queue is full, and the request was refused. Send it again after `retry_after_s` seconds."""

    code = "queue_full"

    def __init__(self, message: str = "", retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineUnavailable(RingfeedError):
    """The engine is starting, draining, unreachable or gone, or the client was closed."""

    code = "unavailable"


class Interrupted(EngineUnavailable):
    """A process of the engine died while it worked on the request. Sent again with what has arrived, it goes on.

    Clients do that themselves, for `resume_timeout_s` seconds.
    """

    code = "interrupted"


class RequestFailed(RingfeedError):
    """The engine accepted the request and could not finish it."""

    code = "request_failed"


class LogitsNotFinite(RequestFailed):
    """The model computed NaN or infinity for this request. Other requests are not affected."""

    code = "logits_not_finite"


class TokensExcluded(RequestFailed):
    """The request's parameters exclude every token at some position. Other requests are not affected."""

    code = "tokens_excluded"


class ProtocolError(RingfeedError, ValueError):
    """Bytes that are not a message of this protocol, or an engine that speaks another version of it."""

    code = "protocol"


class RingError(RingfeedError):
    """A shared-memory ring was used against its rules, or does not match its reader. Never leaves the engine."""

    code = "ring"


class RingFull(RingError):
    """The reader did not free a record in time."""


class LayoutMismatch(RingError):
    """Two processes disagree on the layout, size or epoch of a ring."""


_BY_CODE: dict[str, type[RingfeedError]] = {
    error.code: error
    for error in (
        ConfigError, ModelUnsupported, InvalidRequest, QueueFull, EngineUnavailable, Interrupted, RequestFailed,
        LogitsNotFinite, TokensExcluded, ProtocolError,
    )
}  # fmt: skip


def error_from_code(code: str, message: str, retry_after_s: float = 0.0) -> RingfeedError:
    """The error that a message names. An unknown code gives the root class."""
    error = _BY_CODE.get(code, RingfeedError)(message)
    error.retry_after_s = retry_after_s
    return error
