"""Grammar processes in plain Python that check what the scheduler tells them.

A request for masks must come before its step runs, in the order of the steps, for the sequences whose rows the step
record gives these masks. It must carry each sequence's one token that has not been told yet, and key 0 exactly for the
sequences that have ended by then. Requests for the masks of a device that has been replaced are read for their tokens.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

from ipc.mask_records import MaskRequestRecord, mask_request_layout
from ipc.messages import Compile, Compiled
from ipc.records import NO_TOKEN, StepRecord, StepShape
from ipc.ring import Ring, close_handle
from workers.scheduler.scheduler import Scheduler


class _Owed(NamedTuple):
    """The masks that a planned step needs."""

    tickets: list[int]  # by worker; 0 = none
    keys: list[list[int]]  # by worker, in the order of its masks


class FakeGrammar:
    """`planned` sees each step record, `answer` takes the requests of the step that runs next."""

    def __init__(self, shape: StepShape, num_workers: int, num_records: int) -> None:
        layout = mask_request_layout(shape)
        rings = [Ring.create(f"mask_request.{i}", layout, num_records, 1) for i in range(num_workers)]
        self.writers: list[Ring[MaskRequestRecord]] = [Ring.attach(ring.handle, layout, writer=True) for ring in rings]
        self._readers = rings
        for ring in rings:
            close_handle(ring.handle)
        self.told: dict[int, list[int]] = {}  # tokens of each sequence, in the order in which they came
        self.matchers: dict[int, int] = {}  # worker of each sequence that is compiled and not released
        self.compiles: list[tuple[int, Compile]] = []  # not answered yet
        self._num_known: dict[int, int] = {}  # tokens of each resumed sequence that its Compile brought
        self._owed: deque[_Owed] = deque()
        self.num_masks: dict[int, int] = {}  # that each sequence has got
        self._has_mask: set[int] = set()  # sequences that got one of this device: the next comes with a token
        self._num_answered = 0  # steps of this device
        self._num_planned = [0] * num_workers  # mask records of this device
        self._epoch = 1

    def hear(self, scheduler: Scheduler) -> None:
        """Take the scheduler's messages."""
        for worker, messages in scheduler.take_grammar_messages():
            for message in messages:
                if isinstance(message, Compile):
                    self.compiles.append((worker, message))
                    keys = range(message.key, message.key + message.num_samples)
                    assert not self.matchers.keys() & set(keys), "a request was compiled twice"
                    self.matchers |= dict.fromkeys(keys, worker)
                    num_known = [len(token_ids) // 4 for token_ids in message.known]
                    self._num_known |= zip(keys, num_known, strict=False)  # [] = none
                else:
                    for key in message.keys:
                        assert self.matchers.pop(key, worker) == worker, "a sequence was released by another worker"

    def compile(self, scheduler: Scheduler, index: int = 0, error: str = "") -> None:
        """Answer one of the grammars that wait."""
        worker, message = self.compiles.pop(index)
        code = "invalid_request" if error else ""
        scheduler.compiled(worker, Compiled(key=message.key, error_code=code, error_message=error))

    def restart(self, worker: int) -> None:
        """A process has died, and its successor knows nothing."""
        self.matchers = {key: owner for key, owner in self.matchers.items() if owner != worker}
        self.compiles = [each for each in self.compiles if each[0] != worker]

    def replace_device(self) -> None:
        """The mask rings are new ones."""
        self._epoch += 1
        self._owed.clear()
        self._has_mask.clear()
        self._num_planned = [0] * len(self._num_planned)
        self._num_answered = 0

    def planned(self, record: StepRecord, scheduler: Scheduler) -> None:
        """Remember whose masks a new step needs."""
        n, table = int(record.num_seqs[0]), scheduler._table
        tickets = [int(ticket) for ticket in record.mask_ticket[: len(self.writers)]]
        for worker, ticket in enumerate(tickets):
            self._num_planned[worker] += bool(ticket)
            assert ticket in (0, self._num_planned[worker]), "mask records are not numbered one after the other"
        counts = [int(record.num_masks[worker]) if tickets[worker] else 0 for worker in range(len(tickets))]
        keys: list[list[int]] = [[0] * count for count in counts]
        given = set()
        for i, row in enumerate(record.seq_row[:n].tolist()):
            sequence = table.sequences[row]
            assert sequence is not None, f"row {row} has no owner"
            if not (sequence.has_grammar and record.seq_sample[i]):
                assert not any(tickets) or record.seq_mask[i] == -1, "a mask for a sequence that needs none"
                continue
            worker, place = self.matchers[sequence.key], int(record.seq_mask[i])
            keys[worker][place - sum(counts[:worker])] = sequence.key
            given.add(place)
        assert given == set(range(sum(counts))), "masks that belong to no sequence"
        self._owed.append(_Owed(tickets, keys))
        self.hear(scheduler)

    def can_answer(self, scheduler: Scheduler) -> bool:
        """Whether the masks of the step that runs next have been asked for."""
        scheduler.mask_requests.take_published()  # writes those for which there was no room
        for ring in self._readers:
            while ring.is_published(ring.next_ticket) and self._is_old(ring.record(ring.next_ticket)):
                self._take(ring)
                scheduler.mask_requests.take_published()
        tickets = self._owed[0].tickets
        return all(
            not ticket or ring.is_published(ring.next_ticket)
            for ticket, ring in zip(tickets, self._readers, strict=True)
        )

    def answer(self, scheduler: Scheduler) -> None:
        """Take the requests for the step that runs next."""
        self.hear(scheduler)
        assert self.can_answer(scheduler), "a request is missing"
        owed = self._owed.popleft()
        self._num_answered += 1
        for worker, ring in enumerate(self._readers):
            if not owed.tickets[worker]:
                assert not ring.is_published(ring.next_ticket), "a request is there too early"
                continue
            request = ring.record(ring.next_ticket)
            assert int(request.mask_epoch[0]) == self._epoch, "the request is for another device"
            assert int(request.mask_ticket[0]) == owed.tickets[worker], "the request names another mask than the step"
            assert int(request.step[0]) == self._num_answered, "the request is of another step"
            keys = self._take(ring)
            for key, owner in zip(keys, owed.keys[worker], strict=True):
                self.num_masks[key] = self.num_masks.get(key, 0) + 1
                assert key in (0, owner), "the mask is of another sequence"
                assert key or owner not in scheduler._open, "an open sequence gets no mask"
                for sequence in scheduler._open.find([key] if key else []):
                    num_output = scheduler._table.num_tokens[sequence.row] - sequence.num_prompt
                    told = self.told[key]
                    assert self._num_known.get(key, 0) + len(told) == num_output, (
                        f"{key} was told {told} before its mask"
                    )

    def _is_old(self, request: MaskRequestRecord) -> bool:
        return int(request.mask_epoch[0]) < self._epoch

    def _take(self, ring: Ring[MaskRequestRecord]) -> list[int]:
        """Take the next request and note its tokens. Returns its keys."""
        request: Any = ring.take()
        n = int(request.num_masks[0])
        keys, tokens = request.key[:n].tolist(), request.token[:n].tolist()
        for key, token in zip(keys, tokens, strict=True):
            if key:
                is_new = token != NO_TOKEN
                assert is_new or key not in self._has_mask, f"sequence {key} gets two masks in the same place"
                self.told.setdefault(key, []).extend([token] if is_new else [])
        self._has_mask |= set() if self._is_old(request) else set(keys) - {0}
        ring.release_through(ring.next_ticket - 1)
        return keys

    def check_empty(self, scheduler: Scheduler) -> None:
        """No matcher is left, and no grammar is parked."""
        self.hear(scheduler)
        assert not self.matchers, "a matcher was never released"
        assert not scheduler._grammar_workers._parked
        assert all(worker.num_sequences == 0 for worker in scheduler._grammar_workers._workers)
