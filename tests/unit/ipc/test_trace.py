"""The trace rings and the hooks that write to them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc.errors import LayoutMismatch
from ipc.trace import KINDS, Span, TraceHandle, TraceRing
from ipc.tracer import NO_TRACE, RingTracer, tracer


@pytest.fixture
def handle() -> Iterator[TraceHandle]:
    handle = TraceRing.create("scheduler", num_records=8)
    yield handle
    os.close(handle.fd)


def test_every_kind_has_a_row_and_room_for_its_values() -> None:
    kinds = {value for name, value in vars(Span).items() if name.isupper()}
    assert kinds == set(KINDS) == set(range(len(KINDS)))
    assert len({kind.name for kind in KINDS.values()}) == len(KINDS)
    assert max(len(kind.values) for kind in KINDS.values()) <= 3


def test_records_are_read_through_another_mapping_as_they_were_written(handle: TraceHandle) -> None:
    writer, reader = TraceRing(handle), TraceRing(handle)
    assert reader.drain().shape == (0, 6)
    writer.write(Span.PLAN, 2**60, 5, 1, 2, 3)
    writer.write(Span.STEP, 10, 20, -7)
    assert reader.drain().tolist() == [[Span.PLAN, 2**60, 5, 1, 2, 3], [Span.STEP, 10, 20, -7, 0, 0]]
    assert reader.drain().shape == (0, 6)


def test_a_full_ring_drops_what_comes_and_counts_it(handle: TraceHandle) -> None:
    writer, reader = TraceRing(handle), TraceRing(handle)
    for number in range(11):
        writer.write(Span.APPLY, number, 1)
    assert reader.num_dropped == 3
    assert reader.drain()[:, 1].tolist() == list(range(8))
    writer.write(Span.APPLY, 11, 1)
    assert reader.drain()[:, 1].tolist() == [11]
    assert reader.num_dropped == 3


@given(st.lists(st.one_of(st.none(), st.integers(1, 12)), max_size=30))
def test_whatever_the_order_of_writes_and_reads_nothing_is_lost_but_what_is_counted(
    actions: list[int | None],
) -> None:
    """An integer writes that number of records, None drains."""
    handle = TraceRing.create("any", num_records=8)
    writer, reader = TraceRing(handle), TraceRing(handle)
    os.close(handle.fd)
    num_written = 0
    read: list[int] = []
    for action in (*actions, None):
        if action is None:
            read += reader.drain()[:, 1].tolist()
        else:
            for _ in range(action):
                writer.write(Span.APPLY, num_written, 1)
                num_written += 1
    assert read == sorted(set(read))
    assert len(read) + reader.num_dropped == num_written


def test_what_a_killed_writer_wrote_stays(handle: TraceHandle) -> None:
    pid = os.fork()
    if pid == 0:
        TraceRing(handle).write(Span.LAUNCH, 1, 2, 3)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert TraceRing(handle).drain().tolist() == [[Span.LAUNCH, 1, 2, 3, 0, 0]]


def test_a_segment_that_is_too_small_for_its_handle_is_refused(handle: TraceHandle) -> None:
    with pytest.raises(LayoutMismatch, match="scheduler"):
        TraceRing(TraceHandle("scheduler", handle.fd, num_records=10_000))


def test_a_span_records_its_time_and_values_also_when_its_work_fails(handle: TraceHandle) -> None:
    trace, reader = tracer(handle), TraceRing(handle)
    with trace[Span.AWAKE]:
        with trace[Span.PLAN] as span:
            span.set(7, np.int32(2), 3)
        with pytest.raises(KeyError), trace[Span.PLAN]:
            raise KeyError
    first, second, awake = reader.drain().tolist()
    assert [first[0], second[0], awake[0]] == [Span.PLAN, Span.PLAN, Span.AWAKE]
    assert (first[3:], second[3:]) == ([7, 2, 3], [0, 0, 0])
    assert awake[1] <= first[1] <= first[1] + first[2] <= second[1]
    assert second[1] + second[2] <= awake[1] + awake[2]


def test_a_gauge_is_recorded_when_it_changes(handle: TraceHandle) -> None:
    trace, reader = tracer(handle), TraceRing(handle)
    for value in (1, 1, 2, 2, 1):
        trace.gauge(Span.STEP_RING, value)
    trace.gauge(Span.PROMPT_RING, 1)
    assert reader.drain()[:, [0, 3]].tolist() == [
        [Span.STEP_RING, 1], [Span.STEP_RING, 2], [Span.STEP_RING, 1], [Span.PROMPT_RING, 1],
    ]  # fmt: skip


def test_without_a_ring_the_same_hooks_do_nothing() -> None:
    trace = tracer(None)
    assert trace is NO_TRACE
    assert not isinstance(trace, RingTracer)
    assert len(trace) == len(KINDS)
    with trace[Span.PLAN] as span:
        span.set(1, 2, 3)
    trace.record(Span.STEP, 1, 2, 3)
    trace.gauge(Span.STEP_RING, 1)
    assert len({id(span) for span in trace}) == 1, "a span that is not recorded has no state"
