"""The time-outs of requests that have not reached the scheduler. From `Accepted` on, the scheduler enforces them."""

from __future__ import annotations

from ipc.messages import FinishReason
from ipc.scheduling_params import SchedulingParams
from workers.gateway.request_table import Request, RequestState, RequestTable
from workers.queueing.timers import Timers


def to_ns(seconds: float) -> int:
    """Seconds as the nanoseconds of messages and timers."""
    return round(seconds * 1e9)


class RequestTimers:
    """Timers of the requests in `table`. `queue_timeout_s` holds for those that set none; None = no limit."""

    def __init__(self, table: RequestTable, queue_timeout_s: float | None) -> None:
        self._table = table
        self._queue_timeout_s = queue_timeout_s
        self._timers = Timers(self._is_timed_here)

    @property
    def first_ns(self) -> int | None:
        """When `take_due` may have something to return; None: not before the next request."""
        return self._timers.first_ns

    def clear(self) -> None:
        self._timers.clear()

    def set(self, key: int, scheduling: SchedulingParams, now_ns: int, *, is_resumed: bool = False) -> int:
        """Set the timers that the scheduler will set too. Returns the time of the deadline; 0 = none.

        A resumed request has no queue time-out: its client has the beginning of the answer, and waits for the rest.
        """
        wait_s = scheduling.queue_timeout_s or self._queue_timeout_s
        if wait_s is not None and not is_resumed:
            self._timers.add(now_ns + to_ns(wait_s), key, "queue_timeout")
        if scheduling.deadline_s is None:
            return 0
        deadline_ns = now_ns + to_ns(scheduling.deadline_s)
        self._timers.add(deadline_ns, key, "deadline")
        return deadline_ns

    def take_due(self, now_ns: int) -> list[tuple[Request, FinishReason]]:
        """The requests whose time has run out here, each with the reason that came first."""
        if self._timers.first_ns is None or self._timers.first_ns > now_ns:
            return []
        due: dict[Request, FinishReason] = {}
        for key, reason in self._timers.take_due(now_ns):
            request = self._table.request(key)
            if request is not None and request.state is not RequestState.ACCEPTED:
                due.setdefault(request, reason)
        return list(due.items())

    def _is_timed_here(self, key: int) -> bool:
        """Whether a request is open and, as far as the gateway knows, has not reached the scheduler."""
        request = self._table.request(key)
        return request is not None and request.state is not RequestState.ACCEPTED
