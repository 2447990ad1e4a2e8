"""Traces of workers in shared memory: the table of span kinds, and one ring of fixed-size records per thread.

    header page:  records written, records dropped   owned by the writer, one thread
                  records read                        owned by the launcher
    then          records: kind | start_ns | duration_ns | three values | (spare), one cache line each

The writer never waits: if the reader is a whole ring behind, the writer drops the record and counts it. The reader
takes all unread records at once. If one side dies, the other side keeps the records. Times are CLOCK_MONOTONIC.

To trace something new: a kind, its row in `KINDS`, and `with process.trace[Span.X]` around the work (`ipc/tracer.py`).
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np

from ipc.atomics import Words
from ipc.errors import LayoutMismatch
from ipc.shared_memory import PAGE_BYTES, create_segment, map_segment

NUM_RECORDS: Final = 32_768  # of one ring: 2 MiB, several seconds of the busiest thread
_WORDS_PER_RECORD: Final = 8
_RECORD_BYTES: Final = 8 * _WORDS_PER_RECORD
_RECORD: Final = struct.Struct("=6q")
_WRITTEN, _DROPPED, _READ = 0, 1, 16  # header words; the reader's on a cache line of its own


class Span:
    """The kinds of records, numbered without gaps. Plain integers: to look up an enumeration's member costs 60 ns."""

    AWAKE: Final = 0  # from wake-up to sleep of a worker; all other spans lie inside
    REQUEST: Final = 1
    ENCODE: Final = 2
    HAND_OVER: Final = 3
    RECEIVE: Final = 4
    PLAN: Final = 5
    LAUNCH: Final = 6
    PUBLISH: Final = 7
    APPLY: Final = 8
    DETOKENIZE: Final = 9
    DELIVER: Final = 10
    SEND: Final = 11
    STEP: Final = 12
    STEP_RING: Final = 13
    PROMPT_RING: Final = 14
    SEQUENCES: Final = 15
    MISSING_MASKS: Final = 16
    MASK: Final = 17


class Form(enum.Enum):
    SPAN = "span"  # of the thread that recorded it
    DEVICE = "device"  # of the device's compute stream
    COUNTER = "counter"  # no duration: what the values are from then on


@dataclass(frozen=True)
class Kind:
    """The name of a kind of record, and the names of its values, at most three."""

    name: str
    values: tuple[str, ...] = ()
    form: Form = Form.SPAN


KINDS: Final[dict[int, Kind]] = {
    Span.AWAKE: Kind("awake"),
    Span.REQUEST: Kind("request"),  # gateway: a client's message
    Span.ENCODE: Kind("encode", ("num_tokens",)),  # tokenizer: a prompt becomes ids
    Span.HAND_OVER: Kind("hand over", ("ticket", "num_tokens")),  # tokenizer: the ids go into its ring
    Span.RECEIVE: Kind("receive"),  # scheduler: its messages
    Span.PLAN: Kind("plan", ("ticket", "num_seqs", "num_tokens")),
    Span.LAUNCH: Kind("launch", ("ticket", "bucket_seqs", "bucket_tokens")),  # GPU process: a step is enqueued
    Span.PUBLISH: Kind("publish", ("ticket",)),  # GPU process: a step's result is published
    Span.APPLY: Kind("apply", ("ticket",)),
    Span.DETOKENIZE: Kind("detokenize"),  # detokenizer: it handles a step's tokens
    Span.DELIVER: Kind("deliver"),  # detokenizer, gateway: outputs of a client's requests
    Span.SEND: Kind("send"),  # the messages that were decided go into the sockets
    Span.STEP: Kind("step", ("ticket",), Form.DEVICE),
    Span.STEP_RING: Kind("step ring", ("in_flight",), Form.COUNTER),  # planned and not applied
    Span.PROMPT_RING: Kind("prompt ring", ("records",), Form.COUNTER),  # not released
    Span.MASK: Kind("mask", ("ticket", "num_masks")),  # grammar process: which tokens sequences may sample
    Span.SEQUENCES: Kind("sequences", ("running", "waiting"), Form.COUNTER),
    Span.MISSING_MASKS: Kind("missing masks", ("num_masks",), Form.COUNTER),  # GPU process: of the step it holds back
}


class TraceHandle(msgspec.Struct, frozen=True):
    """One thread's ring, for another process to attach."""

    track: str  # "scheduler", "tokenizer.0", ...
    fd: int
    num_records: int = NUM_RECORDS


class TraceRing:
    """One side's view of a ring: its one writer, or its one reader. The mapping outlives the descriptor."""

    def __init__(self, handle: TraceHandle) -> None:
        self.track = handle.track
        self.num_records = handle.num_records
        self._map = map_segment(handle.fd)
        if len(self._map) < PAGE_BYTES + self.num_records * _RECORD_BYTES:
            raise LayoutMismatch(f"trace {self.track}: {len(self._map)} bytes hold no {self.num_records} records")
        self._header = Words(memoryview(self._map), 0, PAGE_BYTES // 8)
        self._records = np.frombuffer(self._map, np.int64, self.num_records * _WORDS_PER_RECORD, PAGE_BYTES).reshape(
            self.num_records, _WORDS_PER_RECORD
        )
        self._num_written = self._header.load(_WRITTEN)
        self._num_read = self._header.load(_READ)

    @staticmethod
    def create(track: str, num_records: int = NUM_RECORDS) -> TraceHandle:
        """Make the segment. Its descriptor is the caller's to close. Raises RingError if there is no memory for it."""
        fd = create_segment(f"ringfeed-trace-{track}", PAGE_BYTES + num_records * _RECORD_BYTES)
        return TraceHandle(track, fd, num_records)

    def write(
        self, kind: int, start_ns: int, duration_ns: int, first: int = 0, second: int = 0, third: int = 0
    ) -> None:
        """Record something that has ended. Costs a few hundred nanoseconds and never waits."""
        written = self._num_written
        if written - self._num_read >= self.num_records:
            self._num_read = self._header.load(_READ)
            if written - self._num_read >= self.num_records:
                self._header.store(_DROPPED, self._header.load(_DROPPED) + 1)
                return
        offset = PAGE_BYTES + written % self.num_records * _RECORD_BYTES
        _RECORD.pack_into(self._map, offset, kind, start_ns, duration_ns, first, second, third)
        self._num_written = written + 1
        self._header.store(_WRITTEN, written + 1)  # last, with release order: a reader that sees it sees the record

    @property
    def num_dropped(self) -> int:
        return self._header.load(_DROPPED)

    def drain(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Take all records: [n, 6] int64 kind, start_ns, duration_ns and the three values."""
        written = self._header.load(_WRITTEN)
        places = np.arange(self._num_read, written) % self.num_records
        records: np.ndarray[Any, np.dtype[np.int64]] = self._records[places, : _RECORD.size // 8]  # a copy
        self._num_read = written
        self._header.store(_READ, written)
        return records
