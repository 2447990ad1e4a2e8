"""Finds the request whose computation ends the GPU process, by resuming one sequence at a time.

    first death               all sequences are resumed as usual
    second death in a window  every sequence that has a row is a suspect: probation begins
    probation                 suspects are resumed one by one, each when the one before has passed; nothing is admitted
    death in probation        the sequence on trial gets a mark, and its request goes last
    second mark of a request  the request ends with an error
    all have passed           probation ends

A sequence passes when all tokens have come that were planned for it at the death, and at least one. Until then it may
repeat the step that ended the process. A sequence that passes loses its marks.

Knows no ranks and no blocks: the admission says which sequences have rows, in their order.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable

from workers.scheduler.sequence import Sequence
from workers.scheduler.sequence_table import SequenceTable

MAX_MARKS = 2


class Probation:
    """`window_s`: two deaths within it begin a probation. `clock`: nanoseconds."""

    def __init__(self, window_s: float, table: SequenceTable, clock: Callable[[], int]) -> None:
        self._window_ns = round(window_s * 1e9)
        self._table = table
        self._clock = clock
        self._died_ns: int | None = None  # the last death
        self._suspects: deque[Sequence] = deque()  # to resume, in this order
        self._on_trial: Sequence | None = None
        self._marked: list[Sequence] = []  # once for each mark
        self._goals: dict[int, int] = {}  # by the sequence's key: tokens with which it passes

    @property
    def is_on(self) -> bool:
        """Whether `next` alone says what may run. Ends when the last suspect has passed or ended."""
        self._look()
        return bool(self._suspects or self._on_trial is not None)

    def next(self) -> Sequence | None:
        """The suspect to resume. None: one is on trial."""
        self._look()
        return self._suspects[0] if self._on_trial is None and self._suspects else None

    def resumed(self, sequence: Sequence) -> None:
        """A sequence runs again. If it is the next suspect, it is on trial."""
        if self._suspects and sequence is self._suspects[0]:
            self._on_trial = self._suspects.popleft()

    def preempted(self, sequence: Sequence) -> None:
        """A sequence runs no more. If it was on trial, it is the next suspect."""
        self._look()
        if sequence is self._on_trial:
            self._suspects.appendleft(sequence)
            self._on_trial = None

    def device_died(self, sequences: Iterable[Sequence], was_ready: bool) -> set[int]:
        """The GPU process has died: call it before the table is reset. `sequences` have rows, in order of rank.

        `was_ready`: it may have begun with a step. Otherwise no sequence is the cause, and its death does not count.
        Returns the keys of the requests that have ended the process twice. The caller ends them.
        """
        was_on, now_ns = self.is_on, self._clock()
        if not was_ready:
            if self._on_trial is not None:
                self.preempted(self._on_trial)
            return set()
        is_second = self._died_ns is not None and now_ns - self._died_ns <= self._window_ns
        self._died_ns = now_ns
        if self._on_trial is not None:
            self._marked.append(self._on_trial)
        self._on_trial = None
        if not (is_second or was_on):
            return set()
        rows = list(sequences)
        self._marked = [each for each in self._marked if each in rows]  # the others have ended
        num_marks = Counter(each.request_key for each in self._marked)
        guilty = {key for key, num in num_marks.items() if num >= MAX_MARKS}
        rows = [each for each in rows if each.request_key not in guilty]
        self._suspects = deque(sorted(rows, key=lambda each: num_marks[each.request_key]))  # marked ones go last
        self._goals = {each.key: self._goal(each) for each in rows}
        return guilty

    def _goal(self, sequence: Sequence) -> int:
        table, row = self._table, sequence.row
        least = max(int(table.num_tokens[row]) + 1, int(table.num_planned_tokens[row]))
        return max(least, self._goals.get(sequence.key, 0))

    def _look(self) -> None:
        """Let the sequence on trial pass if it may, and forget suspects that have ended."""
        if (tried := self._on_trial) is not None:
            has_ended = self._table.sequences[tried.row] is not tried
            if has_ended or int(self._table.num_tokens[tried.row]) >= self._goals[tried.key]:
                self._on_trial = None
                self._marked = [each for each in self._marked if each is not tried]
        while self._suspects and self._table.sequences[self._suspects[0].row] is not self._suspects[0]:
            self._suspects.popleft()
