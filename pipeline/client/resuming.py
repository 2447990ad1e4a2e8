"""Sends interrupted requests and queries again, as soon as an engine takes them.

Reads and changes `PendingAnswers.waiting`. Asks the engine for its health, once for all questions that wait, and keeps
their time limits. It has timers and no task, so it does not keep its client alive. A request goes on only with the
model that began it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Final

from ipc.codec import encode
from ipc.errors import EngineUnavailable, Interrupted, InvalidRequest
from ipc.messages import Health, Query
from pipeline.client.callbacks import weakly
from pipeline.client.connection import Connection
from pipeline.client.interruption import Interruption
from pipeline.client.open_request import OpenRequest
from pipeline.client.pending import PendingAnswers, Question

_FIRST_PAUSE_S: Final = 0.02  # between two looks; doubled after each
_LONGEST_PAUSE_S: Final = 0.5
_QUERY_ID: Final = 0  # no caller's query has it: a session's begin at 1


class Resumer:
    """Sends what waits in `pending` over one connection.

    Args:
        pending: the client's open questions.
        connection: where to send them.
        loop: the event loop of both.
        endpoint: where the engine listens, for errors.
        limit_s: how long a question may wait without news; None = no limit.
        has_ended: whether the engine has ended for good: nobody will start it again.
    """

    def __init__(
        self,
        pending: PendingAnswers,
        connection: Connection,
        loop: asyncio.AbstractEventLoop,
        *,
        endpoint: str,
        limit_s: float | None,
        has_ended: Callable[[], bool],
    ) -> None:
        self._pending = pending
        self._connection = connection
        self._loop = loop
        self._endpoint = endpoint
        self._limit_s = limit_s
        self._has_ended = has_ended
        self._timer: asyncio.Handle | None = None
        self._is_soon = False  # the timer fires in this round of the loop
        self._pause_s = _FIRST_PAUSE_S
        self._state = ""  # of the engine, when it was last asked over this connection
        self._model: str | None = None  # that it had then
        self._is_asking = False  # for its health
        pending.on_waiting, pending.on_health = weakly(self.wake), weakly(self._take_health)

    def wake(self) -> None:
        """Look at the waiting questions soon: another one waits, or the engine has come."""
        self._pause_s = _FIRST_PAUSE_S
        if not self._is_soon:
            self._cancel_timer()
            self._is_soon = True
            self._timer = self._loop.call_soon(weakly(self._look))

    def meet_engine(self) -> None:
        """The connection stands, to the same engine as before or to another one."""
        self._state = ""
        self._ask_health()
        self.wake()

    def close(self) -> None:
        """Send nothing any more."""
        self._cancel_timer()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer, self._is_soon = None, False

    def _look(self) -> None:
        """End what has waited too long, send what can be sent, and look again after a pause."""
        self._timer, self._is_soon = None, False
        waiting = self._pending.waiting
        if waiting and self._has_ended():
            self._pending.fail_all(EngineUnavailable(
                f"the engine at {self._endpoint} is gone, and its launcher does not start it again"
            ))  # fmt: skip
        now = time.monotonic()
        next_end = min([self._end_late(question, now) for question in list(waiting.values())], default=math.inf)
        if not waiting:
            self._is_asking = False
            return
        if self._connection.is_up:
            due = [question for question in waiting.values() if _interruption(question).retry_at <= now]
            self._send([question for question in due if not question.needs_ready])
            if any(question.needs_ready for question in due) and not self._is_asking:
                self._ask_health()
        self._timer = self._loop.call_later(min(self._pause_s, next_end - now), weakly(self._look))
        self._pause_s = min(2.0 * self._pause_s, _LONGEST_PAUSE_S)

    def _end_late(self, question: Question, now: float) -> float:
        """End a question that has waited too long. Returns when its time ends; infinity if it has ended."""
        interruption = _interruption(question)
        deadline = question.deadline if isinstance(question, OpenRequest) else math.inf
        ends_at = interruption.ends_at(self._limit_s)
        if now < min(deadline, ends_at):
            return min(deadline, ends_at)
        self._pending.remove(question)
        if isinstance(question, OpenRequest) and deadline <= now:
            question.end_here("deadline")
        else:
            answers = self._connection.is_up and self._state
            state = self._state if answers else f"no engine answers at {self._endpoint}"
            question.fail(Interrupted(
                f"{interruption.cause}; no engine continued it within {self._limit_s:g} s "
                f"(resume_timeout_s of the client): {state}"
            ))  # fmt: skip
        return math.inf

    def _ask_health(self) -> None:
        self._is_asking = True
        self._connection.send(encode(Query(query_id=_QUERY_ID, what="health")))

    def _take_health(self, health: Health) -> None:
        """The engine has told its health, perhaps because a caller has asked for it."""
        self._is_asking = False
        if self._model not in (None, health.model):
            self._fail_requests(health.model)
        self._model = health.model
        self._state = f"the engine is {health.state}" + (f": {health.detail}" if health.detail else "")
        if health.state in ("ready", "recovering", "draining"):
            now = time.monotonic()
            due = [each for each in self._pending.waiting.values() if _interruption(each).retry_at <= now]
            # A draining engine takes requests that go on, for a moment after a process of it has died.
            self._send([each for each in due if health.state != "draining" or isinstance(each, OpenRequest)])

    def _fail_requests(self, model: str) -> None:
        """Another model cannot continue the texts of this one."""
        for question in list(self._pending.waiting.values()):
            if isinstance(question, OpenRequest):
                self._pending.remove(question)
                question.fail(Interrupted(
                    f"{_interruption(question).cause}; the engine at {self._endpoint} now has model {model!r}, and "
                    f"model {self._model!r} began the request: send it again"
                ))  # fmt: skip

    def _send(self, questions: list[Question]) -> None:
        now = time.monotonic()
        for question in questions:
            try:
                frame = question.frame_again(now)
            except InvalidRequest as error:
                self._pending.remove(question)
                question.fail(error)
                continue
            _interruption(question).sent(now)
            question.sent_again()
            del self._pending.waiting[question.key]
            self._connection.send(frame)


def _interruption(question: Question) -> Interruption:
    assert question.interruption is not None, f"{question.key} waits, so it was interrupted"
    return question.interruption
