"""The promises of devices. The simulated device reports exactly the accesses that are not ordered; the timed device
keeps time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from random import Random

import pytest
import torch
from torch import Tensor

from tests.simulation.simulated_device import Deadlock, SimulatedDevice, SimulatedStream, UnorderedAccess
from workers.gpu.device.timed import TimedDevice


def device(seed: int = 0) -> SimulatedDevice:
    return SimulatedDevice(Random(seed))


def drain(simulated: SimulatedDevice) -> None:
    while not simulated.is_idle:
        simulated.run_one()


def access(
    simulated: SimulatedDevice, stream: SimulatedStream, *, reads: Sequence[Tensor] = (), writes: Sequence[Tensor] = ()
) -> None:
    simulated.launch(stream, lambda: None, lambda: (reads, writes))


def run_order(seed: int) -> list[str]:
    """The order in which two streams' work, three pieces each, has run."""
    simulated = device(seed)
    order: list[str] = []
    for name in ("a", "b"):
        stream = simulated.stream(name)
        for i in range(3):
            simulated.launch(stream, partial(order.append, f"{name}{i}"), lambda: ((), ()))
    assert order == [], "work ran when it was enqueued"
    drain(simulated)
    return order


def test_work_runs_late_and_in_an_order_that_the_seed_decides() -> None:
    orders = [run_order(seed) for seed in range(20)]
    assert orders == [run_order(seed) for seed in range(20)]
    assert len(set(map(tuple, orders))) > 5
    for order in orders:
        assert [place for place in order if place[0] == "a"] == ["a0", "a1", "a2"]
        assert [place for place in order if place[0] == "b"] == ["b0", "b1", "b2"]


@pytest.mark.parametrize("first_writes", [True, False])
@pytest.mark.parametrize("second_writes", [True, False])
@pytest.mark.parametrize("waits", [True, False])
def test_two_streams_may_share_bytes_only_to_read_or_in_an_order_by_event(
    first_writes: bool, second_writes: bool, waits: bool
) -> None:
    simulated = device()
    one, two = simulated.stream("one"), simulated.stream("two")
    event, x = simulated.event("event"), simulated.zeros("x", (8,), torch.int32)
    access(simulated, one, **{"writes" if first_writes else "reads": [x[2:6]]})
    simulated.record(event, one)
    if waits:
        simulated.wait(two, event)
    access(simulated, two, writes=[x[:2], x[6:]])  # next to it is not the same bytes
    is_fault = not waits and (first_writes or second_writes)
    with pytest.raises(UnorderedAccess, match="two") if is_fault else nullcontext():
        access(simulated, two, **{"writes" if second_writes else "reads": [x[5:]]})


def test_waiting_for_an_event_does_not_cover_what_came_after_its_record() -> None:
    simulated = device()
    one, two = simulated.stream("one"), simulated.stream("two")
    event, x = simulated.event("event"), simulated.zeros("x", (1,), torch.int32)
    simulated.record(event, one)
    access(simulated, one, writes=[x])
    simulated.wait(two, event)
    with pytest.raises(UnorderedAccess):
        access(simulated, two, reads=[x])


def test_host_threads_know_of_each_other_by_release_and_acquire_only() -> None:
    for acquires in (True, False):
        simulated = device()
        simulated.register_host("ring", memoryview(bytearray(64)))
        simulated.act_as("writer")
        simulated.host_access("ring", 0, 64, write=True)
        simulated.release("ticket 1")
        simulated.act_as("reader")
        if acquires:
            simulated.acquire("ticket 1")
            simulated.host_access("ring", 0, 64, write=False)
        else:
            with pytest.raises(UnorderedAccess, match="writer's write"):
                simulated.host_access("ring", 0, 64, write=False)


def test_the_host_may_touch_a_copys_memory_after_synchronize_or_a_query_that_said_yes() -> None:
    simulated = device()
    stream, event = simulated.stream("copy"), simulated.event("done")
    memory = simulated.register_host("ring", memoryview(bytearray(64)))
    target = simulated.zeros("staging", (64,), torch.uint8)
    simulated.copy(stream, target, memory)
    simulated.record(event, stream)
    assert not simulated.query(event)
    with pytest.raises(UnorderedAccess):
        simulated.host_access("ring", 0, 8, write=True)
    simulated.synchronize(event)
    simulated.host_access("ring", 0, 8, write=True)


def test_a_wait_that_nothing_will_end_is_a_deadlock() -> None:
    simulated = device()
    one, two = simulated.stream("one"), simulated.stream("two")
    a, b = simulated.event("a"), simulated.event("b")
    a.num_recorded = 1  # recorded, so it seems, on a stream that never gets there
    simulated.wait(one, a)
    simulated.record(b, one)
    simulated.wait(two, b)
    with pytest.raises(Deadlock, match="one"):
        simulated.synchronize(b)


def test_a_timed_stream_takes_the_time_it_is_told_and_begins_where_the_last_step_ended() -> None:
    timed = TimedDevice()
    compute, done = timed.stream("compute"), [timed.event("first"), timed.event("second")]
    start, end = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    enqueued_ns = time.monotonic_ns()
    for i in range(2):
        timed.read_clock(compute, start[i : i + 1])
        timed.launch(compute, lambda: timed.spend(20_000_000), lambda: ((), ()))
        timed.read_clock(compute, end[i : i + 1])
        timed.record(done[i], compute)
    assert not timed.query(done[1])
    timed.synchronize(done[1])
    assert time.monotonic_ns() >= int(end[1]) >= enqueued_ns + 40_000_000
    assert timed.query(done[0])
    assert timed.query(done[1])
    assert (end - start).tolist() == [20_000_000, 20_000_000]
    assert int(start[1]) == int(end[0])
