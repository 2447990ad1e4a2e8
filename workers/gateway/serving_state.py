"""Whether the engine takes requests, and when it has drained. Knows no messages and no sockets.

    starting ──start──> ready <──engine_state──> recovering
                          └──────── drain ───────────┴──> draining ──> drained
    any state ──fail──> failed ──> drained

A draining engine takes no new requests. It still takes requests that go on: if a process dies while the engine drains,
clients hear `Interrupted`, and send what they have.
"""

from __future__ import annotations

import math
from typing import Final, Literal

from ipc.errors import EngineUnavailable

State = Literal["starting", "ready", "recovering", "draining", "failed"]

RESUME_WAIT_S: Final = 3.0  # for clients to send their requests again, once all processes serve


class ServingState:
    """Times are seconds of one monotonic clock.

    Args:
        drain_timeout_s: the longest time for open requests to end.
        is_first: whether no gateway of this engine has died. Clients of a dead one may have requests that go on.
    """

    def __init__(self, drain_timeout_s: float, *, is_first: bool) -> None:
        self.state: State = "starting"
        self.detail = "the engine's workers are starting"
        self._drain_timeout_s = drain_timeout_s
        self._is_first = is_first
        self._drain_deadline = math.inf
        self._resumed_until = -math.inf  # until then clients may send requests that go on; infinity = longer
        self._has_drained = False

    def start(self, now: float) -> None:
        if self.state == "starting":
            self.state, self.detail = "ready", ""
            self._resumed_until = -math.inf if self._is_first else now + RESUME_WAIT_S

    def engine_state(self, state: Literal["ready", "recovering"], detail: str, now: float) -> None:
        """A process is started again or may hang, or all of them serve."""
        if self.state in ("ready", "recovering"):
            self.state, self.detail = state, detail
        if state == "recovering":
            self._resumed_until = math.inf
        elif self._resumed_until == math.inf:
            self._resumed_until = now + RESUME_WAIT_S

    def drain(self, now: float) -> None:
        if self.state in ("starting", "ready", "recovering"):
            self.state, self.detail = "draining", "the engine is draining"
            self._drain_deadline = now + self._drain_timeout_s

    def fail(self, detail: str) -> None:
        self.state, self.detail = "failed", detail

    def check_takes_requests(self, *, is_resumed: bool) -> None:
        """Raise EngineUnavailable if this is no time for a request. `is_resumed`: it goes on."""
        if self.state in ("ready", "recovering") or (is_resumed and self._awaits_resumed):
            return
        raise EngineUnavailable("the engine is starting" if self.state == "starting" else self.detail)

    def has_just_drained(self, num_open: int) -> bool:
        """Whether nothing is left to finish. True once."""
        if self._has_drained or num_open or self._awaits_resumed:
            return False
        self._has_drained = self.state in ("draining", "failed")
        if self._has_drained:
            self._drain_deadline = math.inf
        return self._has_drained

    def next_tick(self) -> float:
        """When `tick` has something to do; infinity = not before the next event."""
        return min(self._drain_deadline, self._resumed_until if self._awaits_resumed else math.inf)

    def tick(self, now: float) -> bool:
        """Whether open requests have to end now, because a drain has taken too long. True once."""
        if now >= self._resumed_until:
            self._resumed_until = -math.inf
        if now < self._drain_deadline:
            return False
        self._drain_deadline, self._resumed_until = math.inf, -math.inf
        return True

    @property
    def _awaits_resumed(self) -> bool:
        return self.state == "draining" and self._resumed_until > -math.inf
