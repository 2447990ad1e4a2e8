"""The sequences that do not run: waiting ones, which have no row yet, and preempted ones, which have kept theirs.

A sequence whose grammar is not compiled yet is parked: it takes a place among the waiting ones, and cannot be next.

Owns the bounds of the queue, the hint when to try again, and which sequence of both kinds is next. The policy orders
the waiting sequences (`workers/queueing/policies.py`). Preempted sequences are resumed in order of their rank, and
before any waiting sequence unless that has a lower rank.
"""

from __future__ import annotations

from collections.abc import Callable

from ipc.errors import QueueFull
from ipc.messages import Ended, Tokenized
from workers.queueing.drain_rate import DrainRate
from workers.queueing.policies import Policy, RankedRequests
from workers.scheduler.array_types import IntArray
from workers.scheduler.config import SchedulerConfig
from workers.scheduler.sequence import Sequence, num_known_of


class WaitingQueue:
    """`clock` gives nanoseconds."""

    def __init__(self, config: SchedulerConfig, policy: Policy[Sequence], clock: Callable[[], int]) -> None:
        self.num_waiting_tokens = 0  # that the waiting sequences have: their prompts, and output if they are resumed
        self._max_num_waiting = config.max_num_waiting
        self._max_num_waiting_tokens = config.max_num_waiting_tokens
        self._policy = policy
        self._preempted: RankedRequests[Sequence] = RankedRequests()
        self._parked: set[int] = set()  # keys
        self._clock = clock
        self._admission_rate = DrainRate()

    def __bool__(self) -> bool:
        """Whether some sequence could run."""
        return bool(len(self._policy) or self._preempted)

    @property
    def num_waiting(self) -> int:
        """With the parked ones."""
        return len(self._policy) + len(self._parked)

    @property
    def num_preempted(self) -> int:
        return len(self._preempted)

    def refusal(self, message: Tokenized, num_free_rows: int) -> Ended | None:
        """The error that ends a request for which the queue has no room; None if all its samples may wait.

        The bound on prompt tokens never refuses a request while no other one waits.
        """
        num, tokens, max_tokens = self.num_waiting, self.num_waiting_tokens, self._max_num_waiting_tokens
        num_known = num_known_of(message)
        num_samples, new_tokens = len(num_known), sum(num_known)
        if num + num_samples > self._max_num_waiting + num_free_rows:
            text = (
                f"{num} requests wait already; with this one (n = {num_samples}) there would be more than "
                f"scheduler.max_num_waiting ({self._max_num_waiting}) and free rows ({num_free_rows}) allow"
            )
        elif max_tokens is not None and num and tokens + new_tokens > max_tokens:
            text = (
                f"{num} requests with {tokens} prompt tokens wait already; with the {new_tokens} of this one there "
                f"would be more than scheduler.max_num_waiting_tokens ({max_tokens})"
            )
        else:
            return None
        retry_s = self._admission_rate.retry_after_s(num, self._clock())  # the time to admit the waiting requests
        return Ended(
            key=message.key,
            finish_reason="error",
            error_code=QueueFull.code,
            error_message=f"{text}: try again in {retry_s:g} s",
            retry_after_s=retry_s,
        )

    def park(self, sequence: Sequence) -> None:
        """A sequence begins to wait, and cannot be next before `unpark`."""
        self._parked.add(sequence.key)
        self.num_waiting_tokens += sequence.num_known

    def unpark(self, sequence: Sequence) -> None:
        """A parked sequence waits for a row from now on, at the place that the policy gives it by its arrival."""
        self._parked.remove(sequence.key)
        self.num_waiting_tokens -= sequence.num_known
        self.add(sequence)

    def add(self, sequence: Sequence) -> None:
        """A sequence begins to wait for a row."""
        if not len(self._policy):
            self._admission_rate.begin(self._clock())
        self._policy.add(sequence)
        self.num_waiting_tokens += sequence.num_known

    def next(self, num_free_rows: int) -> Sequence | None:
        """The first preempted sequence, or the policy's next one if a row is free and its rank is lower."""
        preempted = self._preempted.first()
        waiting = self._policy.next() if num_free_rows else None
        if preempted is None or (waiting is not None and waiting.rank < preempted.rank):
            return waiting
        return preempted

    def leave_for_row(self, sequence: Sequence) -> None:
        """The next waiting sequence has got a row."""
        self._policy.dequeue(sequence)
        self.num_waiting_tokens -= sequence.num_known
        self._admission_rate.leave(self._clock())

    def preempt(self, sequence: Sequence) -> None:
        """A sequence waits to be resumed. It keeps its row and its ids."""
        self._preempted.add(sequence)

    def resume(self, sequence: Sequence) -> None:
        """The next preempted sequence runs again."""
        self._preempted.remove(sequence)

    def is_preempted(self, sequence: Sequence) -> bool:
        return sequence in self._preempted

    def sampled(self, rows: IntArray) -> None:
        """A step samples one token for each of these rows, which the policy may charge."""
        self._policy.sampled(rows)

    def void(self, rows: IntArray) -> None:
        """A step that was counted for these rows of open sequences samples nothing."""
        self._policy.void(rows)

    def end(self, sequence: Sequence) -> None:
        """A sequence has ended, whether it was parked, waiting, running or preempted."""
        if not sequence.has_row:
            self.num_waiting_tokens -= sequence.num_known
        if sequence.key in self._parked:
            self._parked.remove(sequence.key)
            return
        self._preempted.remove(sequence)
        self._policy.end(sequence)
