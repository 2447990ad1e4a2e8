"""The ring protocol under every interleaving of its processes' loads and stores, with deaths between any two of them.

The code under test is ipc.ring.Ring and ipc.doorbell.Doorbell, over a memory and a kernel that the explorer steps. The
sleeping and waking around them is that of workers/process.py: sleep, drain, look until nothing is there. Each mutant at
the end breaks one rule of the protocol, and the explorer must find out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

import ipc.doorbell
import ipc.ring
from ipc.doorbell import Doorbell
from ipc.errors import RingFull
from ipc.record_layout import Layout
from ipc.ring import Ring, RingHandle
from tests.simulation.total_store_order import DONE, Explorer, Process, Program, Violation

READER_BELL, WRITER_BELL = 0, 1
TO_THIRD_PARTY, FROM_THIRD_PARTY = 0, 1
CURSOR = 8 * ipc.ring._READ_CURSOR
EPOCH = 7


class TracedMemory:
    """Loads and stores of the running process. While the ring is being made, they go directly to `values`."""

    def __init__(self) -> None:
        self.values: dict[int, int] = {}
        self.process: Process | None = None
        self.cursor_seen = 0

    def load(self, address: int) -> int:
        value = self.process.load(address) if self.process else self.values[address]
        if address == CURSOR:
            self.cursor_seen = value
        return value

    def store(self, address: int, value: int) -> None:
        if self.process:
            self.process.store(address, value)
        else:
            self.values[address] = value


class TracedWords:
    """Replaces ipc.atomics.Words, and the array of a record's field."""

    def __init__(self, memory: TracedMemory, offset: int) -> None:
        self.load = self.__getitem__ = lambda i: memory.load(offset + 8 * i)
        self.store = lambda i, value: memory.store(offset + 8 * i, value)


class TracedLayout(Layout[Any]):
    """A record of two words."""

    def __init__(self, memory: TracedMemory) -> None:
        super().__init__("pair", [("first", "<i8", (1,)), ("second", "<i8", (1,))])
        self.memory = memory

    def views(self, buffer: Any, offset: int = 0) -> Any:
        return SimpleNamespace(**{f.name: TracedWords(self.memory, offset + f.offset) for f in self.fields.values()})


@dataclass(frozen=True)
class Rules:
    """How the processes use ring and doorbell. Each default is a rule; the mutants break one.

    Without `check_full`, the writer does not look whether RingFull comes when it should.
    """

    ring_class: type[Ring[Any]] = Ring
    ring_after_publish: bool = True
    ring_after_release: bool = True
    ring_on_attach: bool = True
    resume_as_writer: bool = True
    drain_before_looking: bool = True
    read_before_release: bool = True
    hear_third_party_before_release: bool = True
    check_full: bool = True


class RingModel:
    """Writer, cursor owner and, where wanted, a third process that reads by ticket what the owner names."""

    def __init__(self, patch: pytest.MonkeyPatch, rules: Rules, num_slots: int, num_items: int) -> None:
        self.rules, self.num_slots, self.num_items = rules, num_slots, num_items
        self.memory = TracedMemory()
        segment: list[bytearray] = []
        patch.setattr(ipc.ring, "create_segment", lambda _, num_bytes: segment.append(bytearray(num_bytes)) or 0)
        patch.setattr(ipc.ring, "map_segment", lambda _: segment[0])
        patch.setattr(ipc.ring, "Words", lambda _, offset, __: TracedWords(self.memory, offset))
        patch.setattr(ipc.doorbell, "os", SimpleNamespace(eventfd_write=self._ring, eventfd_read=self._drain))
        self.layout = TracedLayout(self.memory)
        ring = rules.ring_class.create("model", self.layout, num_slots, EPOCH)
        self.handle: RingHandle = ring.handle
        for offset in ring.record_offsets:  # a ring slot's ticket, epoch and two words, which start out as zeros
            start = offset - ipc.ring._SLOT_HEADER_BYTES
            words = (start, start + 8, *(offset + field.offset for field in self.layout.fields.values()))
            self.memory.values.update(dict.fromkeys(words, 0))
        self.ring = ring
        self.at_rest = vars(ring).copy()

    def explore(self, *, num_kills: int = 0, third_party: bool = False, max_held: int = 1) -> int:
        """Visit every state; returns how many there are. The owner takes up to `max_held` records, then frees them."""
        self.max_held = max_held
        programs = [
            Program("writer", ("attach", 0), self._running(self.writer)),
            Program("owner", ("attach", 0), self._running(self.owner_with_third_party if third_party else self.owner),
                    can_die=not third_party),
        ]  # fmt: skip
        if third_party:
            programs.append(Program("third party", ("listen", 0), self._running(self.third_party), can_die=False))
        return Explorer(programs, self.memory.values, num_items=self.num_items, num_kills=num_kills).run()

    def _running(self, advance: Callable[[str, int], Any]) -> Callable[[Process, Any], Any]:
        def run(process: Process, rest: tuple[str, int]) -> Any:
            self.process = self.memory.process = process
            what, self.ring.next_ticket = rest
            following = advance(what, self.ring.next_ticket)
            # `next_ticket` is the only state of a Ring. With more, a resting state would need more fields.
            assert vars(self.ring) | {"next_ticket": 1} == self.at_rest
            return following if following == DONE else (following, self.ring.next_ticket)

        return run

    def _ring(self, bell: int, _: int) -> None:
        self.process.ring(bell)

    def _drain(self, bell: int) -> None:
        if not self.process.drain(bell):
            raise BlockingIOError

    def attach(self, *, writer: bool) -> None:
        self.ring.next_ticket = self.rules.ring_class.attach(self.handle, self.layout, writer=writer).next_ticket
        if self.rules.ring_on_attach:
            Doorbell(READER_BELL).ring()
            Doorbell(WRITER_BELL).ring()

    def sleep(self, bell: int) -> None:
        self.process.sleep(bell)
        if self.rules.drain_before_looking:
            Doorbell(bell).drain()

    # Actions of the processes, from rest to rest

    def writer(self, what: str, ticket: int) -> str:
        if what == "attach":
            self.attach(writer=self.rules.resume_as_writer)
            return "write"
        if what == "sleep":
            self.sleep(WRITER_BELL)
            return "write"
        if ticket > self.num_items:
            return DONE
        try:
            record = self.ring.claim()
        except RingFull:
            if self.rules.check_full:
                assert ticket - self.memory.cursor_seen == self.num_slots, "RingFull though a record is free"
            if not self.rules.drain_before_looking:
                Doorbell(WRITER_BELL).drain()
            return "sleep"
        if self.rules.check_full:
            assert ticket - self.memory.cursor_seen < self.num_slots, "no RingFull though no record is free"
        record.first.store(0, 10 * ticket + 1)
        record.second.store(0, 10 * ticket + 2)
        assert self.ring.publish() == ticket
        if self.rules.ring_after_publish:
            Doorbell(READER_BELL).ring()
        return "write"

    def owner(self, what: str, ticket: int) -> str:
        if what == "attach":
            self.attach(writer=False)
            return "sleep"
        if what == "sleep":
            self.sleep(READER_BELL)
            return "look"
        held = []
        while len(held) < self.max_held and (record := self.ring.take()) is not None:
            held.append(record)
        if not held:
            if not self.rules.drain_before_looking:
                Doorbell(READER_BELL).drain()
            return "sleep"
        last = ticket + len(held) - 1
        if not self.rules.read_before_release:
            self.ring.release_through(last)
        for held_ticket, record in enumerate(held, ticket):
            self.check(record, held_ticket)
            self.process.deliver(held_ticket)
        self.check(held[0], ticket)  # still
        if self.rules.read_before_release:
            self.ring.release_through(last)
        if self.rules.ring_after_release:
            Doorbell(WRITER_BELL).ring()
        return "look"

    def owner_with_third_party(self, what: str, ticket: int) -> str:
        if what != "look":
            return self.owner(what, ticket)
        if self.ring.take() is None:
            return "sleep"
        self.process.send(TO_THIRD_PARTY, ticket)
        if self.rules.hear_third_party_before_release:
            assert self.process.receive(FROM_THIRD_PARTY) == ticket
        self.ring.release_through(ticket)
        Doorbell(WRITER_BELL).ring()
        return "look"

    def third_party(self, what: str, _: int) -> str:
        ticket = self.process.receive(TO_THIRD_PARTY)
        self.check(self.ring.record(ticket), ticket)
        self.process.deliver(ticket)
        self.process.send(FROM_THIRD_PARTY, ticket)
        return "listen"

    def check(self, record: Any, ticket: int) -> None:
        found = record.first.load(0), record.second.load(0)
        assert found == (10 * ticket + 1, 10 * ticket + 2), f"record {ticket} holds {found}"
        for other in (ticket - self.num_slots, ticket + self.num_slots):
            assert not self.ring.is_published(other), f"record {other} is said to lie where {ticket} does"


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Callable[..., RingModel]:
    def make(num_slots: int, num_items: int, rules: Rules | None = None) -> RingModel:
        return RingModel(monkeypatch, rules or Rules(), num_slots, num_items)

    return make


@pytest.mark.parametrize(("num_slots", "num_items"), [(1, 4), (2, 5), (3, 6)])
def test_every_interleaving_delivers_every_record_whole_and_in_order(model, num_slots, num_items):
    assert model(num_slots, num_items).explore() > 2_000  # states: fewer would mean that nothing overlapped


@pytest.mark.parametrize(("num_slots", "num_items", "num_kills"), [(1, 3, 2), (2, 4, 1), (3, 4, 1)])
def test_a_death_between_any_two_stores_and_a_successor_lose_nothing(model, num_slots, num_items, num_kills):
    assert model(num_slots, num_items).explore(num_kills=num_kills) > 20_000


@pytest.mark.parametrize(("num_slots", "num_items"), [(1, 3), (2, 4)])
def test_a_third_process_reads_whole_records_by_ticket_while_the_writer_may_die(model, num_slots, num_items):
    assert model(num_slots, num_items).explore(num_kills=1, third_party=True) > 5_000


def test_records_may_be_held_while_later_ones_are_taken(model):
    assert model(3, 5).explore(max_held=2) > 5_000


# Mutants


def _broken_rule(rules: Rules) -> str:
    return ",".join(getattr(value, "__name__", f"not {name}") for name, value in vars(rules).items()
                    if value != getattr(Rules(), name))  # fmt: skip


class TicketBeforePayload(Ring):
    def claim(self) -> Any:
        record = super().claim()
        super().publish()
        return record

    def publish(self) -> int:
        return self.next_ticket - 1


class EpochNotStored(Ring):
    def publish(self) -> int:
        self._slot_words[self.next_ticket % self.num_slots].store(ipc.ring._TICKET, self.next_ticket)
        self.next_ticket += 1
        return self.next_ticket - 1


class OneRecordTooManyIsFree(Ring):
    def num_free(self) -> int:
        return super().num_free() + 1


class OneRecordTooFewIsFree(Ring):
    def num_free(self) -> int:
        return super().num_free() - 1


class LaterTicketsCountAsPublished(Ring):
    def is_published(self, ticket: int) -> bool:
        return self._slot_words[ticket % self.num_slots].load(ipc.ring._TICKET) >= ticket


class EarlierTicketsCountAsPublished(Ring):
    def is_published(self, ticket: int) -> bool:
        return self._slot_words[ticket % self.num_slots].load(ipc.ring._TICKET) <= ticket


class ReleasesOneTooMany(Ring):
    def release_through(self, ticket: int) -> None:
        self._header.store(ipc.ring._READ_CURSOR, ticket + 2)


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        (Rules(ring_class=TicketBeforePayload), r"record \d holds"),
        (Rules(ring_class=EpochNotStored), "is of epoch 0, not 7"),
        (Rules(ring_class=OneRecordTooManyIsFree), "no RingFull though no record is free"),
        (Rules(ring_class=OneRecordTooManyIsFree, check_full=False), "holds|is not there|is said to|everyone sleeps"),
        (Rules(ring_class=OneRecordTooFewIsFree), "RingFull though a record is free"),
        (Rules(ring_class=LaterTicketsCountAsPublished), "is said to lie where"),
        (Rules(ring_class=EarlierTicketsCountAsPublished), "is not there"),
        (Rules(ring_class=ReleasesOneTooMany), "no record is free|holds|has been released"),
        (Rules(ring_after_publish=False), "everyone sleeps"),
        (Rules(ring_after_release=False), "everyone sleeps"),
        (Rules(drain_before_looking=False), "everyone sleeps"),
        (Rules(read_before_release=False), "holds|is said to lie where"),
    ],
    ids=lambda value: _broken_rule(value) if isinstance(value, Rules) else "",
)
@pytest.mark.parametrize("num_slots", [1, 2])
def test_a_broken_rule_is_found(model, broken, found, num_slots):
    with pytest.raises(Violation, match=found):
        model(num_slots, 4, broken).explore()


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        (Rules(ring_on_attach=False), "everyone sleeps"),
        (Rules(resume_as_writer=False), "attach to write with writer=True"),
    ],
    ids=lambda value: _broken_rule(value) if isinstance(value, Rules) else "",
)
def test_a_broken_rule_of_restarts_is_found(model, broken, found):
    model(2, 3, broken).explore()  # without a death the fault does not show
    with pytest.raises(Violation, match=found):
        model(2, 3, broken).explore(num_kills=1)


def test_releasing_what_a_third_process_still_reads_is_found(model):
    with pytest.raises(Violation, match=r"has been released|is not there|holds"):
        model(1, 3, Rules(hear_third_party_before_release=False)).explore(third_party=True)
