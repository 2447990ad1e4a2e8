"""Which grammar process has the grammar of each structured sequence, and what the scheduler tells these processes.

    park      request -> Compile to the least loaded process
    compiled  its answer -> the sequences of the request that are still open may run
    release   an ended sequence -> ReleaseMatchers
    lose      a process has died; its sequences end, and its successor gets the messages that it was not sent

One of the requests that a process had may have ended it. So each of them is a suspect when its client sends it again:
its grammar is compiled alone, and the next one only when the suspect has got a token or has ended. If the process dies
until then, the suspect is marked again, and no other request is. With MAX_SUSPECTED marks a request is refused.

Knows no sockets: the scheduler's process takes the messages and sends them. Ends no sequence: the scheduler does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final

from ipc.errors import InvalidRequest, RequestFailed
from ipc.messages import Compile, Ended, ReleaseMatchers, SchedulerToGrammar, Tokenized, split_keys
from workers.scheduler.sequence import Sequence
from workers.scheduler.sequence_table import SequenceTable

MAX_SUSPECTED: Final = 3  # deaths of a grammar process: one with other requests, and two with this one alone
ANSWER_SLACK_S: Final = 10.0  # beyond the time to compile: the first grammar also waits for the vocabulary


class GrammarWorkers:
    """The grammar processes by index. Requests whose grammar is not compiled yet are parked here.

    Args:
        num_workers: 0 = requests with structured outputs cannot be served.
        compile_timeout_s: a grammar process takes at most so long for one grammar.
        clock: nanoseconds.
        table: of the sequences that have rows.
    """

    def __init__(
        self,
        num_workers: int,
        compile_timeout_s: float,
        clock: Callable[[], int],
        table: SequenceTable,
    ) -> None:
        limit_s = compile_timeout_s + ANSWER_SLACK_S
        self.silence = (  # the error of those that `expired` returns
            f"the grammar process of this request has answered nothing for {limit_s:g} s "
            f"(grammar.compile_timeout_s + {ANSWER_SLACK_S:g})"
        )
        self._limit_ns = round(limit_s * 1e9)
        self._clock = clock
        self._table = table
        self._parked: dict[int, dict[int, Sequence]] = {}  # by the request's key: its open sequences by their keys
        self._suspects: dict[int, dict[int, Sequence]] = {}  # the same of requests with a mark, parked or not
        self._workers = [_Worker() for _ in range(num_workers)]

    def __len__(self) -> int:
        return len(self._workers)

    def refusal(self, message: Tokenized) -> Ended | None:
        """The error that ends a request if no grammar process may serve it; None if one may, or need not."""
        if message.params.structured_outputs is None:
            return None
        if not self._workers:
            code = InvalidRequest.code
            text = (
                "structured_outputs needs a grammar process, and grammar.num_workers (0) starts none: "
                "set it to 1 or more"
            )
        elif message.resume is not None and message.resume.num_suspected >= MAX_SUSPECTED:
            code, text = (
                RequestFailed.code,
                "the grammar of this request has ended a grammar process twice: simplify the grammar",
            )
        else:
            return None
        return Ended(key=message.key, finish_reason="error", error_code=code, error_message=text)

    def lose(self, index: int, followed: list[Sequence], *, was_ready: bool) -> tuple[list[Sequence], list[Sequence]]:
        """A process has died, and another takes its place.

        `followed` are its open sequences; `was_ready`: it may have begun with their grammars. Returns the sequences
        that get a mark, and the others that it knew. The caller ends both.
        """
        worker = self._workers[index]
        unsent = {message.key for message in worker.compiles}
        known = [sequence for sequence in followed if sequence.request_key not in unsent]

        def is_marked(sequence: Sequence) -> bool:
            key = sequence.request_key
            if worker.trial is None:
                return was_ready and key not in self._suspects
            # Between the two, the process has nothing to do for a suspect.
            is_in_work = key in worker.sent or sequence.has_row
            return was_ready and key == worker.trial and is_in_work

        marked = [sequence for sequence in known if is_marked(sequence)]
        others = [sequence for sequence in known if not is_marked(sequence)]
        worker.lose(unsent)
        return marked, others

    def park(self, sequences: list[Sequence], num_samples: int, *, is_suspect: bool = False) -> None:
        """Have the grammar of a request compiled, by the process that has the least to do. Its sequences share it.

        The request has `num_samples`; those without a sequence have ended, and need no matcher. `is_suspect`: it may
        have ended a grammar process before.
        """
        first, request = sequences[0], sequences[0].request_key
        spec = first.params.structured_outputs
        assert spec is not None, f"request {first.key} has no structured outputs"
        index = min(range(len(self._workers)), key=lambda i: self._workers[i].precedence)
        worker = self._workers[index]
        for sequence in sequences:
            sequence.grammar_worker = index
        self._parked[request] = {sequence.key: sequence for sequence in sequences}
        if is_suspect:
            self._suspects[request] = dict(self._parked[request])
        worker.num_sequences += len(sequences)
        worker.unanswered.add(request)
        known = {sequence.key: sequence.known_output.tobytes() for sequence in sequences}
        keys = range(request, request + num_samples)
        worker.compiles.append(
            Compile(
                key=request,
                num_samples=num_samples,
                spec=spec,
                end_ids=first.end_ids,
                known=[known.get(key, b"") for key in keys] if any(known.values()) else [],
            )
        )
        worker.released += [key for key in keys if key not in known]

    def compiled(self, worker: int, key: int) -> list[Sequence]:
        """A process has answered a request's Compile. Returns the request's open sequences: they are parked no more."""
        self._workers[worker].answered(key, self._clock())
        sequences = self._sequences(key)
        self._parked.pop(key, None)
        return sequences

    def release(self, sequence: Sequence) -> None:
        """A structured sequence has ended, whether it was parked or not."""
        worker = self._workers[sequence.grammar_worker]
        worker.num_sequences -= 1
        worker.released.append(sequence.key)
        request = sequence.request_key
        for by_request in (self._parked, self._suspects):
            if (open_ones := by_request.get(request)) is not None:
                del open_ones[sequence.key]
                if not open_ones:
                    del by_request[request]
                    worker.withdraw(request)

    @property
    def next_timer_ns(self) -> int | None:
        """When `expired` may have something to return; None: not before the next `park`."""
        due_ns = [worker.heard_ns + self._limit_ns for worker in self._workers if worker.sent]
        return min(due_ns, default=None)

    def expired(self) -> list[Sequence]:
        """The parked sequences whose process has answered nothing for too long. The caller ends them."""
        last_ns = self._clock() - self._limit_ns
        late = [worker for worker in self._workers if worker.sent and worker.heard_ns <= last_ns]
        return [sequence for worker in late for key in worker.give_up() for sequence in self._sequences(key)]

    def take_messages(self) -> list[tuple[int, list[SchedulerToGrammar]]]:
        """The messages to each grammar process since the last call, by its index, in order."""
        for worker in self._workers:
            if worker.trial is not None and self._has_passed(worker.trial, worker):
                worker.trial = None
        return [
            (index, messages)
            for index, worker in enumerate(self._workers)
            if (worker.compiles or worker.released) and (messages := worker.take(self._suspects, self._clock()))
        ]

    def _has_passed(self, request: int, worker: _Worker) -> bool:
        """Whether a suspect has ended, or has got past the point at which it may have ended a process."""
        left = self._suspects.get(request, {}).values()
        return request not in worker.sent and all(
            each.has_row and self._table.num_tokens[each.row] > each.num_known for each in left
        )

    def _sequences(self, key: int) -> list[Sequence]:
        return list(self._parked.get(key, {}).values())


class _Worker:
    """One grammar process. It answers every Compile once."""

    def __init__(self) -> None:
        self.num_sequences = 0  # open ones
        self.unanswered: set[int] = set()  # keys of requests
        self.sent: set[int] = set()  # those among them that it has
        self.trial: int | None = None  # the suspect that it has alone
        self.heard_ns = 0  # since when it could have answered: its last answer, or the first question after that
        self.compiles: list[Compile] = []
        self.released: list[int] = []
        self._given_up: set[int] = set()  # requests that ended because it did not answer

    @property
    def precedence(self) -> tuple[bool, bool, int]:
        """The process with the lowest one gets the next request. One that may hang, or may
        die, is asked after the others."""
        return bool(self._given_up), self.trial is not None, self.num_sequences + len(self.unanswered)

    def lose(self, unsent: set[int]) -> None:
        self.unanswered = unsent
        self.sent.clear()
        self.trial = None
        self._given_up.clear()

    def withdraw(self, key: int) -> None:
        """A request has ended. If the process has not got its grammar yet, it never gets it."""
        for message in self.compiles:
            if message.key == key:
                self.compiles.remove(message)
                self.unanswered.discard(key)
                keys = range(key, key + message.num_samples)
                self.released = [each for each in self.released if each not in keys]
                return

    def answered(self, key: int, now_ns: int) -> None:
        self.unanswered.discard(key)
        self.sent.discard(key)
        self._given_up.discard(key)
        self.heard_ns = now_ns

    def give_up(self) -> list[int]:
        """The requests that it has not answered. They are waited for no more."""
        keys = sorted(self.sent)
        self._given_up |= self.sent
        self.unanswered -= self.sent
        self.sent.clear()
        return keys

    def take(self, suspects: Collection[int], now_ns: int) -> list[SchedulerToGrammar]:
        """A sequence is released after its grammar was sent, so this order of the two kinds is the right one.

        A grammar of `suspects` is sent when the process has no other one to compile, and keeps later ones waiting.
        """
        messages: list[SchedulerToGrammar] = []
        while self.compiles and self.trial is None:
            if (key := self.compiles[0].key) in suspects:
                if self.sent:
                    break
                self.trial = key
            self.heard_ns = self.heard_ns if self.sent else now_ns
            self.sent.add(key)
            messages.append(self.compiles.pop(0))
        waiting = [range(each.key, each.key + each.num_samples) for each in self.compiles]
        kept = [key for key in self.released if any(key in keys for keys in waiting)]
        released = [key for key in self.released if key not in kept] if kept else self.released
        self.released = kept
        return [*messages, *split_keys(ReleaseMatchers, released)]
