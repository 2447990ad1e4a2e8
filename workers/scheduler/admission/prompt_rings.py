"""Who still needs which record of the prompt rings, and the upload ring.

Owns the read cursor of every prompt ring. A request's prompt lies in consecutive records of its tokenizer's ring; the
lease on them ends when the step that admits the request has been applied, or earlier if the request has to wait while
its ring fills: it is then sent from ring 0, the scheduler's own, at admission. Cursors move in ticket order, so records
released out of order are held until those in front of them are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from ipc.errors import RingError
from ipc.records import PromptRecord
from ipc.ring import Ring
from workers.scheduler.array_types import Int32Array

UPLOAD_RING: Final = 0


@dataclass(eq=False)
class PromptLease:
    """A claim on `num_records` consecutive records of a ring, from `ticket` on."""

    ring: int
    ticket: int
    num_records: int
    is_waiting: bool  # its request is not admitted yet
    is_released: bool = False


class PromptRings:
    """Bookkeeping over the rings, by their index; `rings[0]` is written here, the others by tokenizers."""

    def __init__(self, rings: Sequence[Ring[PromptRecord]]) -> None:
        self._rings = list(rings)
        self._record_tokens = int(rings[UPLOAD_RING].layout.fields["token_ids"].shape[0])
        self._released: list[dict[int, int]] = [{} for _ in rings]  # first ticket -> records, behind one still in use
        self._waiting: list[deque[PromptLease]] = [deque() for _ in rings]  # leases by age; ended ones go when in front
        self._ends = [ring.read_cursor for ring in rings]  # the first ticket that no lease has named
        self._moved: set[int] = set()

    @property
    def max_upload_tokens(self) -> int:
        """The longest prompt that the upload ring can carry."""
        return self._rings[UPLOAD_RING].num_slots * self._record_tokens

    @property
    def num_upload_records(self) -> int:
        """Records of the upload ring that are not released."""
        return self._rings[UPLOAD_RING].num_unreleased

    def receive(self, ring: int, ticket: int, num_tokens: int) -> tuple[Int32Array, PromptLease]:
        """Copy a prompt, [num_tokens] int32, out of its records and take a lease on them.

        Raises RingError if they are not there.
        """
        lease = self._lease(ring, ticket, num_tokens)
        ids = np.empty(num_tokens, np.int32)
        for i in range(lease.num_records):
            part = ids[i * self._record_tokens : (i + 1) * self._record_tokens]
            part[:] = self._rings[ring].record(ticket + i).token_ids[: len(part)]
        self._waiting[ring].append(lease)
        return ids, lease

    def decline(self, ring: int, ticket: int, num_tokens: int) -> None:
        """Release the records of a prompt that is not wanted."""
        self.release(self._lease(ring, ticket, num_tokens))

    def admit(self, lease: PromptLease, ids: Int32Array) -> PromptLease | None:
        """The lease on the records from which a step may copy the prompt now: its own, or new ones of the upload ring.

        To be released when that step has been applied. None: the upload ring has no room before another step is.
        """
        if lease.is_released:
            return self._upload(ids)
        lease.is_waiting = False
        waiting = self._waiting[lease.ring]
        while waiting and not waiting[0].is_waiting:
            waiting.popleft()
        return lease

    def release(self, lease: PromptLease) -> None:
        """Nobody needs these records any more, a device copy included. Releasing again changes nothing."""
        if lease.is_released:
            return
        lease.is_released, lease.is_waiting = True, False
        released = self._released[lease.ring]
        released[lease.ticket] = lease.num_records
        ring = self._rings[lease.ring]
        cursor = first = ring.read_cursor
        while cursor in released:
            cursor += released.pop(cursor)
        if cursor > first:
            ring.release_through(cursor - 1)
            self._moved.add(lease.ring)

    def relieve(self) -> None:
        """Release what waiting requests hold, oldest first, until half of each ring is or will be free.

        The cursor will stop at the oldest prompt that waits: what lies before it is released, or will be when the steps
        in flight have been applied.
        """
        for i, ring in enumerate(self._rings):
            waiting = self._waiting[i]
            while waiting and 2 * (self._ends[i] - waiting[0].ticket) > ring.num_slots:
                lease = waiting.popleft()
                if lease.is_waiting:
                    self.release(lease)

    def take_moved(self) -> list[int]:
        """Tokenizers' rings that got room since the last call: their writers may wait to hear of it."""
        moved = sorted(self._moved - {UPLOAD_RING})
        self._moved.clear()
        return moved

    def _lease(self, ring: int, ticket: int, num_tokens: int) -> PromptLease:
        if not UPLOAD_RING < ring < len(self._rings):
            raise RingError(f"prompt ring {ring} is none of the tokenizers' (1 to {len(self._rings) - 1})")
        lease = PromptLease(ring, ticket, -(-num_tokens // self._record_tokens), is_waiting=True)
        self._ends[ring] = max(self._ends[ring], ticket + lease.num_records)
        return lease

    def _upload(self, ids: Int32Array) -> PromptLease | None:
        ring = self._rings[UPLOAD_RING]
        num_records = -(-len(ids) // self._record_tokens)
        if ring.num_free() < num_records:
            return None
        lease = PromptLease(UPLOAD_RING, ring.next_ticket, num_records, is_waiting=False)
        for start in range(0, len(ids), self._record_tokens):
            part = ids[start : start + self._record_tokens]
            ring.claim().token_ids[: len(part)] = part
            ring.publish()
        return lease
