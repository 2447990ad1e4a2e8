"""The prompt rings: which of their records are still needed, and sending a prompt again from the upload ring.

Owns the read cursor of every prompt ring. A prompt lies in consecutive records of its tokenizer's ring. The lease on
these records ends when the step that admits the sequence has been applied. It ends earlier if the ring fills while the
sequence waits; the scheduler then sends the prompt from ring 0, its own upload ring, at admission. Cursors move in
ticket order, so a record that is released out of order is held until the records in front of it are released.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from ipc.errors import RingError
from ipc.records import UPLOAD_RING, PromptRecord
from ipc.ring import Ring
from workers.scheduler.array_types import Int32Array
from workers.scheduler.prompt_lease import PromptLease


class PromptRings:
    """The scheduler writes `rings[0]`, the upload ring; each tokenizer writes one of the others."""

    def __init__(self, rings: Sequence[Ring[PromptRecord]]) -> None:
        self._rings = list(rings)
        self._record_tokens = int(rings[UPLOAD_RING].layout.fields["token_ids"].shape[0])
        # By ring: first ticket -> number of records, for leases that are released behind one still in use.
        self._released: list[dict[int, int]] = [{} for _ in rings]
        # By ring: leases of waiting sequences, oldest first. An ended lease stays until it is in front.
        self._waiting: list[deque[PromptLease]] = [deque() for _ in rings]
        self._ends = [ring.read_cursor for ring in rings]  # by ring: the first ticket that no lease has named
        self._freed: set[int] = set()  # rings whose cursor has moved since `take_freed_rings`

    def can_upload(self, num_tokens: int, num_long_words: int) -> bool:
        """Whether the upload ring can carry such a prompt and long values at once."""
        return self._num_records(num_tokens) + self._num_records(num_long_words) <= self._rings[UPLOAD_RING].num_slots

    @property
    def num_upload_records(self) -> int:
        """Number of records of the upload ring that are not released."""
        return self._rings[UPLOAD_RING].num_unreleased

    def receive(self, ring: int, ticket: int, num_tokens: int) -> tuple[Int32Array, PromptLease]:
        """Copy a prompt, [num_tokens] int32, out of its records and lease them.

        Raises RingError if a record is not there.
        """
        lease = self._lease(ring, ticket, num_tokens)
        ids = np.empty(num_tokens, np.int32)
        for i in range(lease.num_records):
            part = ids[i * self._record_tokens : (i + 1) * self._record_tokens]
            part[:] = self._rings[ring].record(ticket + i).token_ids[: len(part)]
        self._waiting[ring].append(lease)
        return ids, lease

    def decline(self, ring: int, ticket: int, num_tokens: int) -> None:
        """Release the records of a prompt without reading them."""
        self.release(self._lease(ring, ticket, num_tokens))

    def leases_for_step(
        self, lease: PromptLease, ids: Int32Array, long_values: Int32Array
    ) -> tuple[PromptLease, PromptLease | None] | None:
        """Leases on records from which a step can copy a prompt and its long values now.

        The prompt's is `lease`, or a new one on the upload ring; that of the long values is None if there are none. The
        caller releases both when that step has been applied. None: the upload ring has no room until another step has
        been applied.
        """
        num_records = self._num_records(len(ids)) * lease.is_released + self._num_records(len(long_values))
        if self._rings[UPLOAD_RING].num_free() < num_records:
            return None
        long_lease = self._upload(long_values) if len(long_values) else None
        if lease.is_released:
            return self._upload(ids), long_lease
        lease.is_waiting = False
        waiting = self._waiting[lease.ring]
        while waiting and not waiting[0].is_waiting:
            waiting.popleft()
        return lease, long_lease

    def release(self, lease: PromptLease) -> None:
        """No process and no device copy reads these records any more. Releasing a lease again changes nothing."""
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
            self._freed.add(lease.ring)

    def release_waiting(self) -> None:
        """Release leases of waiting sequences, oldest first, until half of each ring is free or will be.

        Records in front of the oldest waiting prompt are released already, or will be when the steps in flight have
        been applied.
        """
        for i, ring in enumerate(self._rings):
            waiting = self._waiting[i]
            while waiting and 2 * (self._ends[i] - waiting[0].ticket) > ring.num_slots:
                lease = waiting.popleft()
                if lease.is_waiting:
                    self.release(lease)

    def fence(self, ring: int) -> None:
        """Release the records of a tokenizer that has died, except those that leases name.

        Call it before the tokenizer's successor publishes anything. Messages of the dead one that arrive later must be
        dropped: their records are gone.
        """
        first = end = self._ends[ring]
        while self._rings[ring].is_published(end):
            end += 1
        if end > first:
            self._ends[ring] = end
            self.release(PromptLease(ring, first, end - first, 0, is_waiting=False))

    def take_freed_rings(self) -> list[int]:
        """The tokenizers' rings with newly free records since the last call. Their writers may be waiting for room."""
        freed = sorted(self._freed - {UPLOAD_RING})
        self._freed.clear()
        return freed

    def _lease(self, ring: int, ticket: int, num_tokens: int) -> PromptLease:
        if not UPLOAD_RING < ring < len(self._rings):
            raise RingError(f"prompt ring {ring} does not exist: the tokenizers' rings are 1 to {len(self._rings) - 1}")
        lease = PromptLease(ring, ticket, self._num_records(num_tokens), num_tokens, is_waiting=True)
        self._ends[ring] = max(self._ends[ring], ticket + lease.num_records)
        return lease

    def _num_records(self, num_words: int) -> int:
        return -(-num_words // self._record_tokens)

    def _upload(self, words: Int32Array) -> PromptLease:
        """Write words to the upload ring, which has room for them."""
        ring = self._rings[UPLOAD_RING]
        lease = PromptLease(UPLOAD_RING, ring.next_ticket, self._num_records(len(words)), len(words), is_waiting=False)
        for start in range(0, len(words), self._record_tokens):
            part = words[start : start + self._record_tokens]
            ring.claim().token_ids[: len(part)] = part
            ring.publish()
        return lease
