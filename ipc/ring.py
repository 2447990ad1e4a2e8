"""A ring of fixed-size records in shared memory with exactly one writer and one owner of the read cursor.

    header page:  magic | layout hash | num_slots | epoch      written once, by the creator
                  read cursor                                   owned by one process: records below it are free
    then, per ring slot:  ticket word | epoch word | record      each from a cache line on; the whole fills pages

Ticket t (counting from 1) lies in ring slot t % num_slots. The writer fills the record and stores the ticket last,
with release order. A reader that loads the expected ticket (acquire) therefore sees the whole record. The ring refuses
a record of another epoch: each incarnation of a pair of processes has its own ring and its own epoch.
The writer may reuse a ring slot once the read cursor has passed it. A third process may read records by ticket, as the
GPU process reads prompt rings; until it is done, the cursor's owner must not move the cursor past them.
"""

from __future__ import annotations

import os
from typing import Final, Generic

import msgspec

from ipc.atomics import Words
from ipc.errors import LayoutMismatch, RingError, RingFull
from ipc.record_layout import Layout, R
from ipc.shared_memory import PAGE_BYTES, create_segment, map_segment

MAGIC: Final = 0x52494E47_46454544 >> 1  # "RINGFEED"
_HEADER_BYTES: Final = PAGE_BYTES
_MAGIC, _HASH, _NUM_SLOTS, _EPOCH = range(4)  # word indices in the header
_READ_CURSOR: Final = 16  # on a cache line of its own: it is the one header word that changes
_TICKET, _SLOT_EPOCH = 0, 1  # word indices in a ring slot
_SLOT_HEADER_BYTES: Final = 64


class RingHandle(msgspec.Struct, frozen=True):
    """What another process needs to attach: a descriptor that it holds, and what it must find behind it."""

    name: str
    fd: int
    num_slots: int
    epoch: int
    index: int = 0  # the ring's place among several of one kind: prompt ring 0, 1, ...


class Ring(Generic[R]):
    """One process's end of a ring of records of type `R`: writer, cursor owner, or reader by ticket.

    `records[slot]` are the numpy views of each record (see Layout.views). Only one thread may call the methods.
    """

    def __init__(self, handle: RingHandle, layout: Layout[R]) -> None:
        self.handle = handle
        self.layout = layout
        self.name = handle.name
        self.num_slots = handle.num_slots
        self.epoch = handle.epoch
        self._map = map_segment(handle.fd)
        self.buffer = memoryview(self._map)  # the whole segment, page aligned; CUDA page-locks it
        slot_bytes = _slot_bytes(layout)
        if len(self.buffer) < _HEADER_BYTES + self.num_slots * slot_bytes:
            raise LayoutMismatch(f"ring {self.name}: {len(self.buffer)} bytes cannot hold {self.num_slots} records")
        self._header = Words(self.buffer, 0, _HEADER_BYTES // 8)
        starts = [_HEADER_BYTES + i * slot_bytes for i in range(self.num_slots)]
        self.record_offsets = [start + _SLOT_HEADER_BYTES for start in starts]  # bytes from the start of `buffer`
        self._slot_words = [Words(self.buffer, start, 2) for start in starts]
        self.records = [layout.views(self.buffer, offset) for offset in self.record_offsets]
        self.next_ticket = 1  # the writer's next to publish; the cursor owner's next to consume

    @classmethod
    def create(cls, name: str, layout: Layout[R], num_slots: int, epoch: int) -> Ring[R]:
        """Make the segment and attach to it. The caller closes the descriptor in `handle`."""
        assert num_slots >= 1, f"ring {name} needs at least one record, not {num_slots}"
        fd = create_segment(f"ringfeed-{name}", _HEADER_BYTES + num_slots * _slot_bytes(layout))
        ring = cls(RingHandle(name, fd, num_slots, epoch), layout)
        for word, value in ((_HASH, layout.hash()), (_NUM_SLOTS, num_slots), (_EPOCH, epoch)):
            ring._header.store(word, value)
        ring._header.store(_READ_CURSOR, 1)
        ring._header.store(_MAGIC, MAGIC)
        return ring

    @classmethod
    def attach(cls, handle: RingHandle, layout: Layout[R], *, writer: bool = False) -> Ring[R]:
        """Attach to a ring that another process made.

        The cursor owner continues at the first unreleased record, so it may get records again that a predecessor took.
        `writer=True` continues after the last record that the writer's predecessor published. If there was a
        predecessor, ring the doorbells of both ends now: it may have died between its last store and its ring.
        Raises LayoutMismatch if the ring differs from the handle or the layout.
        """
        ring = cls(handle, layout)
        expected = {_MAGIC: MAGIC, _HASH: layout.hash(), _NUM_SLOTS: handle.num_slots, _EPOCH: handle.epoch}
        for word, value in expected.items():
            if ring._header.load(word) != value:
                what = {_MAGIC: "magic", _HASH: "layout", _NUM_SLOTS: "number of records", _EPOCH: "epoch"}[word]
                raise LayoutMismatch(f"ring {handle.name}: {what} {ring._header.load(word)} found, {value} expected")
        ring.next_ticket = ring.read_cursor
        while writer and ring.is_published(ring.next_ticket):  # ends: only the writer publishes, and we are the writer
            ring.next_ticket += 1
        return ring

    # Writer

    def num_free(self) -> int:
        """How many records the writer can publish before it reaches an unreleased one."""
        return self.num_slots - self.num_unreleased

    @property
    def num_unreleased(self) -> int:
        """Published records that the cursor owner has not released."""
        return self.next_ticket - self.read_cursor

    def claim(self) -> R:
        """The next record to write, as numpy views. Readers cannot see it until `publish()`.

        Raises RingFull if the cursor owner has not released it yet.
        """
        assert not self.is_published(self.next_ticket), f"ring {self.name}: attach to write with writer=True"
        if self.num_free() < 1:
            raise RingFull(
                f"ring {self.name}: all {self.num_slots} records up to {self.next_ticket - 1} are unreleased"
            )
        return self.records[self.next_ticket % self.num_slots]

    def publish(self) -> int:
        """Make the claimed record visible and return its ticket. Ring the reader's doorbell afterwards."""
        ticket = self.next_ticket
        words = self._slot_words[ticket % self.num_slots]
        words.store(_SLOT_EPOCH, self.epoch)
        words.store(_TICKET, ticket)  # last, with release order: a reader that sees it sees the record
        self.next_ticket = ticket + 1
        return ticket

    # Reader

    def memory(self, ticket: int) -> memoryview:
        """The bytes of this ticket's record, [layout.num_bytes], published or not."""
        start = self.record_offsets[ticket % self.num_slots]
        return self.buffer[start : start + self.layout.num_bytes]

    def is_published(self, ticket: int) -> bool:
        return self._slot_words[ticket % self.num_slots].load(_TICKET) == ticket

    def record(self, ticket: int) -> R:
        """Numpy views of a published record, valid until the cursor owner releases it.

        Raises RingError if the record is not published yet, is already released, or belongs to another epoch.
        """
        if ticket < self.read_cursor:
            raise RingError(f"ring {self.name}: record {ticket} has been released (up to {self.read_cursor - 1})")
        words = self._slot_words[ticket % self.num_slots]
        found = words.load(_TICKET)
        if found != ticket:
            raise RingError(f"ring {self.name}: record {ticket} is not there (its place holds {found})")
        epoch = words.load(_SLOT_EPOCH)
        if epoch != self.epoch:
            raise RingError(f"ring {self.name}: record {ticket} is of epoch {epoch}, not {self.epoch}")
        return self.records[ticket % self.num_slots]

    def take(self) -> R | None:
        """Return the next unread record and advance past it; None if there is none. `release_through` frees it."""
        if not self.is_published(self.next_ticket):
            return None
        record = self.record(self.next_ticket)
        self.next_ticket += 1
        return record

    @property
    def read_cursor(self) -> int:
        """The first unreleased ticket."""
        return self._header.load(_READ_CURSOR)

    def release_through(self, ticket: int) -> None:
        """Free every record up to and including `ticket` for reuse. Only the cursor's owner calls this.

        All reads of those records, DMA included, must have completed.
        """
        cursor = self.read_cursor
        assert ticket >= cursor - 1, f"ring {self.name}: the read cursor may not go back to {ticket}"
        assert ticket < cursor or self.is_published(ticket), (
            f"ring {self.name}: record {ticket} is not there to release"
        )
        self._header.store(_READ_CURSOR, ticket + 1)

    def close(self) -> None:
        """Unmap. The views in `records` must not be used afterwards; the descriptor stays open."""
        for words in (self._header, *self._slot_words):
            words.release()
        self.records.clear()
        try:
            self.buffer.release()
            self._map.close()
        except BufferError:
            pass  # a view of a record is still in use: the mapping goes when that view goes


def _slot_bytes(layout: Layout[R]) -> int:
    """Bytes from one ring slot to the next."""
    return _SLOT_HEADER_BYTES + layout.num_bytes


def close_handle(handle: RingHandle) -> None:
    """Close a ring's descriptor. Mappings stay valid; the memory is freed with the last mapping or descriptor."""
    os.close(handle.fd)
