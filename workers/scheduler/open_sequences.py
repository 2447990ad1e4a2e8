"""Every open sequence by its key, and the timers that may end it.

A sequence is open from its arrival to its end, whether it is waiting, running or preempted. Ends none itself: the
scheduler does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from ipc.messages import Tokenized
from workers.queueing.timers import TimeoutReason, Timers
from workers.scheduler.sequence import Sequence


class OpenSequences:
    """Timers count from the request's arrival at the gateway, also for the time it waited there.

    Args:
        queue_timeout_s: limit to the wait of requests that set none of their own; None = no limit.
        clock: nanoseconds, CLOCK_MONOTONIC.
    """

    def __init__(self, queue_timeout_s: float | None, clock: Callable[[], int]) -> None:
        self._queue_timeout_s = queue_timeout_s
        self._clock = clock
        self._by_key: dict[int, Sequence] = {}
        self._timers = Timers(self._by_key.__contains__)

    def __len__(self) -> int:
        return len(self._by_key)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._by_key.values())

    def __contains__(self, key: int) -> bool:
        return key in self._by_key

    def add(self, sequence: Sequence, message: Tokenized) -> None:
        """Open a sequence of the request `message` and set its timers."""
        key = sequence.key
        self._by_key[key] = sequence
        if message.deadline_ns:
            self._timers.add(message.deadline_ns, key, "deadline")
        wait_s = message.scheduling.queue_timeout_s or self._queue_timeout_s
        if wait_s is not None and message.resume is None:  # a client that has an answer's beginning waits for the rest
            self._timers.add(message.arrived_ns + round(wait_s * 1e9), key, "queue_timeout")

    def remove(self, sequence: Sequence) -> None:
        """The sequence has ended. Its timers have no effect from now on."""
        del self._by_key[sequence.key]

    def find(self, keys: Iterable[int]) -> list[Sequence]:
        """The open sequences among these keys, each once."""
        return [self._by_key[key] for key in dict.fromkeys(keys) if key in self._by_key]

    def followed_by(self, grammar_worker: int) -> list[Sequence]:
        """The open sequences that have their grammar in this process."""
        return [sequence for sequence in self._by_key.values() if sequence.grammar_worker == grammar_worker]

    @property
    def next_timer_ns(self) -> int | None:
        """When `expired` may next yield something; None: not before another `add`."""
        return self._timers.first_ns

    def expired(self) -> Iterator[tuple[Sequence, TimeoutReason]]:
        """Yield each open sequence whose time has run out, and why. The caller ends it before it asks for the next.

        A queue time-out has no effect on a sequence that has a row.
        """
        if self._timers.first_ns is None:
            return
        for key, reason in self._timers.take_due(self._clock()):
            sequence = self._by_key.get(key)
            if sequence is not None and not (reason == "queue_timeout" and sequence.has_row):
                yield sequence, reason
