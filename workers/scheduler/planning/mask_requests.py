"""Asks the grammar processes for the masks of steps.

    plan step j    which sequences of j need a mask, and the records in which the masks will be     -> step record
    apply j - 1    step j is the oldest in flight now: each of its sequences has all its tokens     -> request record

A mask for step j depends on every earlier token of the sequence. So the request for j is written when the results of
all earlier steps are applied: at once after the last of them, or with the step itself if no step is in flight. It
carries each sequence's newest token, which its grammar process has not seen:

- A step that samples for a sequence has exactly one mask for it. Between two such steps one token arrives, so at most
  one token is unseen, also after a preemption.
- The first request for a sequence carries no token: the grammar begins behind the prompt.
- A sequence that has ended in the meantime has key 0. Its mask does not matter.

At most one step waits for masks at a time, so a ring of requests fills only if its grammar process hangs. Requests then
wait here, in order. A request is never dropped, because its tokens are told once: if the GPU process dies, a request of
its steps stays valid and names a mask ring that is gone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final, NamedTuple

import numpy as np

from ipc.mask_records import MaskRequestRecord
from ipc.records import NO_TOKEN
from ipc.ring import Ring
from workers.scheduler.array_types import BoolArray, Int32Array, IntArray
from workers.scheduler.planning.step import Batch, PlannedStep, StepMasks
from workers.scheduler.sequence_table import SequenceTable

NO_KEY: Final = 0


class _Request(NamedTuple):
    step: int
    epoch: int  # of the mask ring
    ticket: int  # of the mask record
    keys: IntArray
    tokens: Int32Array


class MaskRequests:
    """Writes `rings`, one for each grammar process. `epoch`: of the mask rings, which are new."""

    def __init__(self, rings: Iterable[Ring[MaskRequestRecord]], table: SequenceTable, epoch: int = 1) -> None:
        self._rings = list(rings)
        self._table = table
        self.replace_rings(epoch)
        self._waiting: list[deque[_Request]] = [deque() for _ in self._rings]
        self._num_waiting = 0
        self._published: list[int] = []

    def replace_rings(self, epoch: int) -> None:
        """The mask rings are new ones, of this epoch. The rings of requests stay."""
        self._epoch = epoch
        self._next_tickets = [1] * len(self._rings)  # of each mask ring

    def plan(self, batch: Batch, samples: BoolArray) -> StepMasks | None:
        """Which masks a step needs that runs this batch. None: it needs none."""
        workers = batch.grammar_workers
        assert workers is not None, "no sequence of this batch has a grammar"
        masks = StepMasks({}, {})
        for worker in range(len(self._rings)):
            places = (samples & (workers == worker)).nonzero()[0]
            if places.size:
                masks.places[worker] = places
                masks.tickets[worker] = self._next_tickets[worker]
                self._next_tickets[worker] += 1
        return masks if masks.places else None

    def send(self, step: PlannedStep) -> None:
        """Ask for the masks of a step that needs some. All results of earlier steps are applied."""
        assert step.masks is not None, f"step {step.ticket} needs no masks"
        for worker, places in step.masks.places.items():
            keys, tokens = self._unseen(step.batch, places)
            self._waiting[worker].append(_Request(step.ticket, self._epoch, step.masks.tickets[worker], keys, tokens))
            self._num_waiting += 1
        self._write()

    def take_published(self) -> list[int]:
        """The grammar processes that have new requests since the last call: ring their doorbells."""
        if self._num_waiting:
            self._write()
        published, self._published = self._published, []
        return published

    def _unseen(self, batch: Batch, places: IntArray) -> tuple[IntArray, Int32Array]:
        """The keys of these sequences, and the token of each that its grammar process has not seen."""
        table, rows = self._table, batch.rows[places]
        is_open = table.generation[rows] == batch.generations[places]
        num_tokens = table.num_tokens[rows]
        num_unseen = num_tokens - table.num_followed_tokens[rows]
        assert ((num_unseen | 1 == 1) | ~is_open).all(), (
            f"rows {rows} have {num_unseen} tokens that their grammar processes do not know"
        )
        tokens = np.where(is_open & (num_unseen > 0), table.token_ids[rows, num_tokens - 1], NO_TOKEN)
        table.num_followed_tokens[rows[is_open]] = num_tokens[is_open]
        return np.where(is_open, table.key[rows], NO_KEY), tokens

    def _write(self) -> None:
        """Publish the requests for which the rings have room."""
        for worker, (ring, waiting) in enumerate(zip(self._rings, self._waiting, strict=True)):
            while waiting and ring.num_free():
                request, record = waiting.popleft(), ring.claim()
                self._num_waiting -= 1
                n = len(request.keys)
                record.mask_epoch[0] = request.epoch
                record.mask_ticket[0] = request.ticket
                record.step[0] = request.step
                record.num_masks[0] = n
                record.key[:n] = request.keys
                record.token[:n] = request.tokens
                ring.publish()
                self._published.append(worker)
