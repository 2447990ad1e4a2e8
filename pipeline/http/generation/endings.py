"""How a sample ended, in the words of OpenAI's API."""

from __future__ import annotations

from typing import Final, Literal

from ipc.messages import FinishReason
from pipeline.http.errors import HttpError

OpenAIFinish = Literal["stop", "length", "tool_calls"]

_QUEUE_TIMEOUT: Final = "queue_timeout_s is over before the engine scheduled the request: allow more time, or try later"
_DEADLINE: Final = "deadline_s is over before the engine generated a token: allow more time, or try later"


def finish_reason(
    reason: FinishReason, stop_string: str | None, *, has_tokens: bool
) -> tuple[OpenAIFinish, str | None]:
    """The finish reason that clients know, and `stop_reason`, vLLM's further field.

    `stop_reason` is the stop string that ended the text. A sample that its deadline cut off has finish reason "length"
    and stop_reason "deadline", because strict clients refuse other finish reasons. Raises HttpError 408 if the time was
    over before the first token.
    """
    if reason == "queue_timeout" or (reason == "deadline" and not has_tokens):
        raise HttpError(408, _QUEUE_TIMEOUT if reason == "queue_timeout" else _DEADLINE, code=reason)
    if reason in ("stop", "length"):
        return reason, stop_string
    return "length", reason
