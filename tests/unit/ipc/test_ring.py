"""Rings in real shared memory: the rules one process sees, and what several do to each other."""

from __future__ import annotations

import os
import random
import select
import signal
import time
from collections.abc import Callable, Iterator

import pytest

import ipc.atomics
from ipc.atomics import Words
from ipc.doorbell import Doorbell
from ipc.errors import LayoutMismatch, RingError, RingFull
from ipc.record_layout import Layout
from ipc.ring import Ring, RingHandle, close_handle
from ipc.shared_memory import create_segment, map_segment

LAYOUT = Layout("numbers", [("value", "<i8", (1,)), ("body", "<i8", (1000,))])


@pytest.fixture
def ring() -> Iterator[Ring]:
    ring = Ring.create("test", LAYOUT, num_slots=3, epoch=5)
    yield ring
    ring.close()
    close_handle(ring.handle)


def publish(ring: Ring, value: int) -> int:
    ring.claim().value[0] = value
    return ring.publish()


def test_records_arrive_in_order_through_another_mapping(ring):
    reader = Ring.attach(ring.handle, LAYOUT)
    for value in range(10):
        assert publish(ring, value) == value + 1
        assert reader.take().value[0] == value
        assert reader.take() is None
        reader.release_through(value + 1)
    reader.close()


def test_a_claimed_record_is_invisible_until_published(ring):
    reader = Ring.attach(ring.handle, LAYOUT)
    ring.claim().value[0] = 1
    assert reader.take() is None
    assert not reader.is_published(1)
    ring.publish()
    assert reader.is_published(1)


def test_a_full_ring_refuses_until_its_owner_releases(ring):
    owner = Ring.attach(ring.handle, LAYOUT)
    for value in range(3):
        assert ring.num_free() == 3 - value
        assert ring.num_unreleased == value
        publish(ring, value)
    with pytest.raises(RingFull, match="all 3 records up to 3 are unreleased"):
        ring.claim()
    owner.take(), owner.take()
    with pytest.raises(RingFull):  # taken is not released
        ring.claim()
    owner.release_through(2)
    assert ring.num_free() == 2
    assert ring.num_unreleased == 1
    assert publish(ring, 3) == 4


def test_a_record_is_refused_before_it_is_published_and_after_its_release(ring):
    owner = Ring.attach(ring.handle, LAYOUT)
    with pytest.raises(RingError, match="record 1 is not there"):
        owner.record(1)
    publish(ring, 10)
    assert owner.record(1).value[0] == 10
    owner.release_through(1)
    with pytest.raises(RingError, match="record 1 has been released"):
        owner.record(1)
    with pytest.raises(RingError, match="record 0 has been released"):  # tickets count from 1; empty places hold 0
        owner.record(0)


def test_the_read_cursor_neither_goes_back_nor_passes_the_writer(ring):
    owner = Ring.attach(ring.handle, LAYOUT)
    publish(ring, 1)
    owner.release_through(0)  # nothing to release is no error
    owner.release_through(1)
    owner.release_through(1)
    with pytest.raises(AssertionError, match="go back"):
        owner.release_through(-1)
    with pytest.raises(AssertionError, match="not there to release"):
        owner.release_through(2)


@pytest.mark.parametrize(
    ("handle", "layout", "what"),
    [
        ({"epoch": 6}, LAYOUT, "epoch 5 found, 6 expected"),
        ({"num_slots": 2}, LAYOUT, "number of records 3 found, 2 expected"),
        ({"num_slots": 9}, LAYOUT, "cannot hold 9 records"),
        ({}, Layout("numbers", [("value", "<i8", (1,)), ("body", "<u8", (1000,))]), "layout"),
        ({}, Layout("number", [("value", "<i8", (1,)), ("body", "<i8", (1000,))]), "layout"),
    ],
)
def test_attaching_to_another_ring_than_expected_is_refused(ring, handle, layout, what):
    ours = ring.handle
    other = RingHandle(**{"name": "test", "fd": ours.fd, "num_slots": 3, "epoch": 5} | handle)
    with pytest.raises(LayoutMismatch, match=what):
        Ring.attach(other, layout)


def test_a_segment_that_is_no_ring_is_refused():
    fd = create_segment("zeros", 1 << 16)
    with pytest.raises(LayoutMismatch, match="magic 0 found"):
        Ring.attach(RingHandle("zeros", fd, 3, 5), LAYOUT)
    os.close(fd)
    with pytest.raises(RingError, match="cannot be mapped"):
        Ring.attach(RingHandle("closed", fd, 3, 5), LAYOUT)


def test_a_record_of_another_epoch_is_refused(ring):
    stale = Ring.attach(ring.handle, LAYOUT)
    stale.epoch = 4  # a writer of an earlier incarnation that was handed this ring
    publish(stale, 1)
    with pytest.raises(RingError, match="epoch 4, not 5"):
        Ring.attach(ring.handle, LAYOUT).take()


def test_a_new_writer_goes_on_after_the_last_published_record(ring):
    publish(ring, 10)
    publish(ring, 11)
    ring.claim().value[0] = 12  # and dies before it publishes
    successor = Ring.attach(ring.handle, LAYOUT, writer=True)
    assert successor.next_ticket == 3
    assert successor.num_free() == 1
    publish(successor, 13)
    with pytest.raises(RingFull):
        successor.claim()
    owner = Ring.attach(ring.handle, LAYOUT)
    assert [owner.take().value[0] for _ in range(3)] == [10, 11, 13]
    owner.release_through(3)
    assert Ring.attach(ring.handle, LAYOUT, writer=True).next_ticket == 4


def test_a_writer_that_attached_as_a_reader_overwrites_nothing(ring):
    publish(ring, 10)
    with pytest.raises(AssertionError, match="writer=True"):
        Ring.attach(ring.handle, LAYOUT).claim()


def test_a_new_cursor_owner_gets_again_what_was_not_released(ring):
    first = Ring.attach(ring.handle, LAYOUT)
    for value in (10, 11, 12):
        publish(ring, value)
    first.take(), first.take()
    first.release_through(1)
    successor = Ring.attach(ring.handle, LAYOUT)
    assert [successor.take().value[0], successor.take().value[0], successor.take()] == [11, 12, None]


def test_records_are_aligned_and_do_not_overlap(ring):
    assert all(offset % 64 == 0 for offset in ring.record_offsets)
    assert (
        min(b - a for a, b in zip(ring.record_offsets, ring.record_offsets[1:], strict=False)) >= LAYOUT.num_bytes + 64
    )
    ring.records[1].body[:] = -1
    assert not any(ring.is_published(ticket) for ticket in range(1, 6))
    assert not ring.records[0].body.any()
    assert not ring.records[2].value.any()


def test_a_closed_ring_leaves_views_that_are_still_held_usable(ring):
    reader = Ring.attach(ring.handle, LAYOUT)
    publish(ring, 10)
    record = reader.take()
    reader.close()
    reader.close()
    assert record.value[0] == 10
    with pytest.raises(ValueError, match="released"):
        reader.take()


def test_words_of_other_processors_go_through_libatomic(monkeypatch):
    if ipc.atomics.ctypes.util.find_library("atomic") is None:
        pytest.skip("libatomic is not installed")
    monkeypatch.setattr(ipc.atomics, "_TOTAL_STORE_ORDER", False)
    buffer = memoryview(bytearray(64))
    words = Words(buffer, 16, 3)
    words.store(1, -(2**62))
    words.store(2, 7)
    assert (words.load(0), words.load(1), words.load(2)) == (0, -(2**62), 7)
    assert buffer[24:40].cast("q").tolist() == [-(2**62), 7]
    words.release()
    with pytest.raises(ValueError, match="released"):
        words.load(0)
    ring = Ring.create("atomic", LAYOUT, 2, 1)
    publish(ring, 3)
    reader = Ring.attach(ring.handle, LAYOUT)
    assert reader.take().value[0] == 3
    close_handle(ring.handle)


def test_a_doorbell_stays_rung_until_it_is_drained():
    bell = Doorbell.create()
    assert not bell.drain()
    bell.ring()
    bell.ring()
    assert select.select([bell], [], [], 0)[0] == [bell]
    assert bell.drain()
    assert not bell.drain()
    assert select.select([bell], [], [], 0)[0] == []
    assert not os.get_inheritable(bell.fileno())
    os.eventfd_write(bell.fd, 2**64 - 2)
    bell.ring()  # the counter is at its limit
    assert bell.drain()
    bell.close()


# Several processes. Children are forked, so that hundreds of them start and die within seconds.


class Crossing:
    """A writer and a reader process on one ring; `progress` counts what the reader has found whole and in order."""

    def __init__(self, num_items: int) -> None:
        self.num_items = num_items
        self.ring = Ring.create("crossing", LAYOUT, 3, epoch=1)
        self.reader_bell, self.writer_bell = Doorbell.create(), Doorbell.create()
        self.progress = Words(memoryview(map_segment(create_segment("progress", 8))), 0, 1)
        self.children: dict[Callable[[], None], int] = {}

    def start(self, role: Callable[[], None]) -> None:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                role()
                status = 0
            finally:
                os._exit(status)
        self.children[role] = pid

    def kill(self, role: Callable[[], None]) -> bool:
        """Kill it and start a successor. False if it had already ended."""
        os.kill(self.children[role], signal.SIGKILL)
        _, status = os.waitpid(self.children.pop(role), 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"{role.__name__} failed"
        self.start(role)
        return os.WIFSIGNALED(status)

    def wait_for_end(self) -> None:
        for role, pid in self.children.items():
            assert os.waitpid(pid, 0)[1] == 0, f"{role.__name__} failed"

    def attach(self, *, writer: bool) -> Ring:
        ring = Ring.attach(self.ring.handle, LAYOUT, writer=writer)
        self.reader_bell.ring()
        self.writer_bell.ring()
        return ring

    def sleep(self, bell: Doorbell) -> None:
        assert select.select([bell], [], [], 10)[0], "slept for ever"
        bell.drain()

    def writer(self) -> None:
        ring = self.attach(writer=True)
        while ring.next_ticket <= self.num_items:
            try:
                record = ring.claim()
            except RingFull:
                self.sleep(self.writer_bell)
                continue
            record.value[0] = ring.next_ticket
            record.body[:] = ring.next_ticket
            ring.publish()
            self.reader_bell.ring()

    def reader(self) -> None:
        ring = self.attach(writer=False)
        while ring.read_cursor <= self.num_items:
            ticket = ring.next_ticket
            record = ring.take()
            if record is None:
                self.sleep(self.reader_bell)
                continue
            assert record.value[0] == ticket
            assert (record.body == ticket).all(), "torn"
            assert ticket <= self.progress.load(0) + 1, "skipped"
            self.progress.store(0, ticket)
            ring.release_through(ticket)
            self.writer_bell.ring()


def test_two_processes_exchange_every_record_in_order():
    crossing = Crossing(num_items=10_000)
    crossing.start(crossing.reader)
    crossing.start(crossing.writer)
    crossing.wait_for_end()
    assert crossing.progress.load(0) == 10_000


def test_processes_killed_at_random_tear_and_lose_nothing():
    crossing, choose = Crossing(num_items=20_000), random.Random(1)
    crossing.start(crossing.reader)
    crossing.start(crossing.writer)
    num_kills, deadline = 0, time.monotonic() + 60
    while crossing.progress.load(0) < crossing.num_items:
        assert time.monotonic() < deadline, f"stuck at {crossing.progress.load(0)} after {num_kills} deaths"
        goal = crossing.progress.load(0) + choose.randrange(200)
        while crossing.progress.load(0) < min(goal, crossing.num_items) and time.monotonic() < deadline:
            os.sched_yield()
        num_kills += crossing.kill(choose.choice((crossing.reader, crossing.writer)))
    crossing.wait_for_end()
    assert num_kills > 10
