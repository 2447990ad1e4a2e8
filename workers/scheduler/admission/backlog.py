"""The requests that do not run: those that wait for a row, bounded, and those that were preempted and keep theirs.

Owns the bounds of the queue, the hint when to try again, and who of both kinds comes in next. The order among those
that wait is the policy's.
"""

from __future__ import annotations

from collections.abc import Callable

from ipc.errors import QueueFull
from ipc.messages import Ended, Tokenized
from workers.queueing.drain_rate import DrainRate
from workers.queueing.policies import Policy, RankedRequests
from workers.scheduler.admission.request import Request
from workers.scheduler.array_types import IntArray
from workers.scheduler.config import SchedulerConfig


class Backlog:
    """`clock` gives nanoseconds."""

    def __init__(self, config: SchedulerConfig, policy: Policy[Request], clock: Callable[[], int]) -> None:
        self.num_waiting_tokens = 0
        self._max_num_waiting = config.max_num_waiting
        self._max_num_waiting_tokens = config.max_num_waiting_tokens
        self._policy = policy
        self._preempted: RankedRequests[Request] = RankedRequests()
        self._clock = clock
        self._admissions = DrainRate()

    def __len__(self) -> int:
        return self.num_waiting + self.num_preempted

    @property
    def num_waiting(self) -> int:
        return len(self._policy)

    @property
    def num_preempted(self) -> int:
        return len(self._preempted)

    def refusal(self, message: Tokenized, num_free_rows: int) -> Ended | None:
        """Why a request may not wait, with all its samples, if it may not. By its tokens, one that finds nobody waiting
        always may."""
        num, tokens, max_tokens = self.num_waiting, self.num_waiting_tokens, self._max_num_waiting_tokens
        num_samples = message.params.n
        new_tokens = num_samples * message.num_prompt_tokens
        if num + num_samples > self._max_num_waiting + num_free_rows:
            text = (
                f"{num} requests wait already; with this one (n = {num_samples}) there would be more than "
                f"scheduler.max_num_waiting ({self._max_num_waiting}) and free rows ({num_free_rows}) allow"
            )
        elif max_tokens is not None and num and tokens + new_tokens > max_tokens:
            text = (
                f"{num} requests with {tokens} prompt tokens wait already; with the {new_tokens} of this one they are "
                f"more than scheduler.max_num_waiting_tokens ({max_tokens})"
            )
        else:
            return None
        retry_s = self._admissions.retry_after_s(num, self._clock())  # the time to admit the requests that wait now
        return Ended(
            key=message.key,
            finish_reason="error",
            error_code=QueueFull.code,
            error_message=f"{text}: try again in {retry_s:g} s",
            retry_after_s=retry_s,
        )

    def add(self, request: Request) -> None:
        if not self.num_waiting:
            self._admissions.begin(self._clock())
        self._policy.add(request)
        self.num_waiting_tokens += request.num_prompt

    def preempt(self, request: Request) -> None:
        """It waits, row and ids kept."""
        self._preempted.add(request)

    def is_preempted(self, request: Request) -> bool:
        return request in self._preempted

    def next(self, num_free_rows: int) -> Request | None:
        """Who comes in next, if anybody can: the first of those preempted, or the policy's next if there is a row for
        it and its rank is lower."""
        preempted = self._preempted.first()
        waiting = self._policy.next() if num_free_rows else None
        if preempted is None or (waiting is not None and waiting.rank < preempted.rank):
            return waiting
        return preempted

    def admit(self, request: Request) -> None:
        """The next one has come in; it has a row now, or has it again."""
        if request in self._preempted:
            self._preempted.remove(request)
            return
        self._policy.admit(request)
        self.num_waiting_tokens -= request.num_prompt
        self._admissions.leave(self._clock())

    def sampled(self, rows: IntArray) -> None:
        """A step computes one new token for each of these rows."""
        self._policy.sampled(rows)

    def end(self, request: Request) -> None:
        """A request has ended, wherever it was."""
        if not request.has_row:
            self.num_waiting_tokens -= request.num_prompt
        self._preempted.remove(request)
        self._policy.end(request)
