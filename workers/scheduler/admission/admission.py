"""The way of a request from its arrival to a row.

    add      Tokenized -> withdrawn?  -> dropped
                       -> refused?    -> opened and ended with an error
                       -> otherwise   -> prompt's records leased -> n sequences -> waiting queue,
                                                                   or parked until their grammar is compiled
    compiled the sequences of a parked request -> waiting queue
    next     the sequence to admit or resume next, in the order of the policy
    admit    waiting sequence   -> records to copy its prompt from -> row
    resume   preempted sequence -> out of the queue; it has kept its row. If the row is lost on the device, because the
             GPU process was replaced: -> records to copy its ids from

Owns the order of these steps; the other modules of this package each hold one of them. Knows nothing of KV blocks and
of a step's tokens: the planner decides whether they suffice for the next sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto

from ipc.messages import PROMPT_TAIL_TOKENS, Ended, Opened, TextOptions, Tokenized
from workers.scheduler.admission.probation import Probation
from workers.scheduler.admission.prompt_rings import PromptRings
from workers.scheduler.admission.request_checks import RequestChecks
from workers.scheduler.admission.waiting_queue import WaitingQueue
from workers.scheduler.array_types import Int32Array
from workers.scheduler.grammar_workers import GrammarWorkers
from workers.scheduler.open_sequences import OpenSequences
from workers.scheduler.output_buffer import OutputBuffer
from workers.scheduler.prompt_lease import PromptLease
from workers.scheduler.sequence import Sequence, sequences_of
from workers.scheduler.sequence_table import SequenceTable

# Leases on the records from which a step copies a sequence's ids and its long values; release them when the step has
# been applied. Empty: the row on the device holds both.
Leases = tuple[()] | tuple[PromptLease, PromptLease | None]


class Arrival(Enum):
    """What became of a tokenized request when it arrived."""

    QUEUED = auto()  # its sequences wait for rows
    PARKED = auto()  # its sequences wait for their grammar
    REFUSED = auto()  # it cannot be served: the detokenizer hears that it opened and that it ended with an error
    WITHDRAWN = auto()  # the gateway withdrew it earlier and has answered it: it is dropped, and no process hears of it


class Admission:
    """The waiting sequences, with everything that they need to get rows."""

    def __init__(
        self,
        checks: RequestChecks,
        queue: WaitingQueue,
        probation: Probation,
        prompts: PromptRings,
        table: SequenceTable,
        open_sequences: OpenSequences,
        grammar_workers: GrammarWorkers,
        eos_token_ids: list[int],
        outputs: OutputBuffer,
        counts: dict[str, int],
        clock: Callable[[], int],
    ) -> None:
        self.queue = queue
        self.probation = probation
        self._checks = checks
        self._prompts = prompts
        self._table = table
        self._open = open_sequences
        self._grammar_workers = grammar_workers
        self._eos_token_ids = eos_token_ids
        self._outputs = outputs
        self._counts = counts
        self._clock = clock
        self._withdrawn: set[int] = set()  # keys of requests to drop when they arrive

    @property
    def num_withdrawn(self) -> int:
        """Number of withdrawn requests that may still arrive."""
        return len(self._withdrawn)

    def add(self, message: Tokenized) -> Arrival:
        """Take in a request with all its samples, or with none of them."""
        assert message.key not in self._open, f"two requests have the key {message.key}"
        if message.key in self._withdrawn:
            self._withdrawn.discard(message.key)
            self._decline_prompt(message)
            return Arrival.WITHDRAWN
        refusal = self._checks.refusal(message) or self._grammar_workers.refusal(message)
        if refusal is None:
            refusal = self.queue.refusal(message, self._table.num_free)
            self._counts["num_queue_full"] += refusal is not None
        if refusal is not None:
            self._refuse(message, refusal)
            return Arrival.REFUSED
        ids, lease = self._prompts.receive(message.ring, message.ticket, message.num_prompt_tokens)
        if message.resume is not None:
            self._prompts.release(lease)  # all known ids are sent from the upload ring
        self._outputs.opened.append(_opened(message, message.params.n, ids))
        max_len, block_size = self._checks.max_len(message), self._checks.block_size
        sequences = sequences_of(message, max_len, ids, lease, self._eos_token_ids, block_size)
        has_grammar = message.params.structured_outputs is not None
        if has_grammar:
            is_suspect = message.resume is not None and message.resume.num_suspected > 0
            self._grammar_workers.park(sequences, message.params.n, is_suspect=is_suspect)
        for sequence in sequences:
            self._open.add(sequence, message)
            (self.queue.park if has_grammar else self.queue.add)(sequence)
        return Arrival.PARKED if has_grammar else Arrival.QUEUED

    def unpark(self, sequences: list[Sequence]) -> None:
        """The grammar of these parked sequences is compiled: they wait for rows from now on."""
        for sequence in sequences:
            self.queue.unpark(sequence)

    def withdraw(self, keys: list[int]) -> list[int]:
        """Drop those of these requests on arrival that are not open now. Returns their keys."""
        withdrawn = [key for key in keys if key not in self._open]
        self._withdrawn.update(withdrawn)
        return withdrawn

    def forget_withdrawn(self, keys: list[int]) -> None:
        """These requests will not arrive any more."""
        self._withdrawn.difference_update(keys)

    def next(self) -> Sequence | None:
        """The sequence to admit, or to resume if it has a row, as soon as there is room for it. Asking changes nothing.

        Without a free row, it can only be a preempted one.
        """
        return self.probation.next() if self.probation.is_on else self.queue.next(self._table.num_free)

    def admit(self, sequence: Sequence, num_cached: int) -> Leases | None:
        """Give the next waiting sequence a row. `num_cached` of its tokens are in the prefix cache.

        Returns None, and changes nothing, if the upload ring has no room before another step is applied.
        """
        leases = self._prompts.leases_for_step(sequence.lease, sequence.token_ids, sequence.long_values)
        if leases is None:
            return None
        sequence.row = self._table.take_row(sequence)
        self.queue.leave_for_row(sequence)
        self._counts["num_admitted"] += 1
        self._counts["num_prompt_tokens"] += sequence.num_prompt
        num_cached = min(num_cached, sequence.num_prompt)  # output that was found does not count
        self._counts["num_cached_tokens"] += num_cached
        self._outputs.admitted.append((sequence.key, self._clock(), num_cached))
        return leases

    def resume(self, sequence: Sequence) -> Leases | None:
        """The next preempted sequence runs again, in the row that it has kept.

        Returns None, and changes nothing, if the row is lost on the device, and the upload ring has no room for its ids
        before another step is applied.
        """
        row, table = sequence.row, self._table
        leases: Leases | None = ()
        if table.is_lost[row]:
            known = table.token_ids[row, : table.num_tokens[row]]
            leases = self._prompts.leases_for_step(sequence.lease, known, sequence.long_values)
            if leases is None:
                return None
            table.is_lost[row] = False
        self.queue.resume(sequence)
        self.probation.resumed(sequence)
        return leases

    def preempt(self, sequence: Sequence) -> None:
        """Let a running sequence wait. It keeps its row and its ids."""
        self.queue.preempt(sequence)
        self.probation.preempted(sequence)
        self._counts["num_preemptions"] += 1

    def replace_device(self, sequences: list[Sequence]) -> None:
        """These sequences have rows, which are lost on the device. They wait to be resumed, as preempted ones do."""
        for sequence in sequences:
            if not self.queue.is_preempted(sequence):
                self.queue.preempt(sequence)

    def end(self, sequence: Sequence) -> None:
        """A sequence has ended, whether it was parked, waiting, running or preempted."""
        self.queue.end(sequence)
        if sequence.has_grammar:
            self._grammar_workers.release(sequence)
        if not sequence.has_row:
            self._prompts.release(sequence.lease)

    def _refuse(self, message: Tokenized, refusal: Ended) -> None:
        """Let the detokenizer open the request and end it with an error."""
        self._outputs.opened.append(_opened(message, 1))
        self._outputs.ended.append(refusal)
        self._decline_prompt(message)
        self._counts["num_refused"] += 1

    def _decline_prompt(self, message: Tokenized) -> None:
        """Release the prompt's records of a request that is not queued. A failed tokenization has written none."""
        if message.ticket:
            self._prompts.decline(message.ring, message.ticket, message.num_prompt_tokens)


def _opened(message: Tokenized, num_samples: int, token_ids: Int32Array | None = None) -> Opened:
    """The detokenizer's first message about a request. `token_ids` is the prompt; None: the request is refused."""
    params = message.params
    return Opened(
        key=message.key,
        route=message.route,
        num_prompt_tokens=message.num_prompt_tokens,
        text=TextOptions.of(params),
        num_logprobs=params.num_logprobs,
        logprob_token_ids=params.logprob_token_ids or [],
        num_samples=num_samples,
        prompt_tail=b"" if token_ids is None else token_ids[-PROMPT_TAIL_TOKENS:].tobytes(),
        arrived_ns=message.arrived_ns,
        tokenized_ns=message.tokenized_ns,
        resume=None if token_ids is None else message.resume,
    )
