"""A device that runs work as late and in as strange an order as events allow, and reports what no event orders.

Streams are queues that `run_one` serves in an order drawn from a seed, so stale and half-written data is really seen.
In any drawn order, every access also carries a vector clock (Fidge, Mattern; the check is FastTrack's). If two accesses
to the same bytes include a write, the first must happen before the second, by

- one stream's or one host thread's own order,
- enqueueing: work runs after everything that its host thread did before it enqueued it,
- events: `record` -> `wait`, `synchronize`, or a `query` that said yes,
- `release` -> `acquire` between host threads: publishing and consuming, which watched rings do by themselves.

Clocks are known when work is enqueued, so a missing order is reported also where the drawn order happens to be right.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch

from workers.gpu.device.base import Accesses
from workers.gpu.device.clock import HostClock

Clock = list[int]  # one entry per actor: how many of its actions are known to be over


class UnorderedAccess(AssertionError):
    """Two accesses to the same bytes that nothing orders, one of them a write."""


class Deadlock(AssertionError):
    """Work is waiting and nothing can run."""


@dataclass
class Actor:
    """A stream or a host thread: its actions are ordered among themselves."""

    name: str
    index: int
    clock: Clock


@dataclass
class SimulatedStream(Actor):
    # Each entry runs when it is ready and at the head.
    queue: deque[tuple[Callable[[], bool] | None, Callable[[], None]]] = field(default_factory=deque)


@dataclass
class SimulatedEvent:
    name: str
    clock: Clock  # of the stream at the latest record
    num_recorded: int = 0
    num_fired: int = 0


@dataclass
class Access:
    """Bytes [start, end) of a storage, touched by an actor at its own time `time`."""

    start: int
    end: int
    is_write: bool
    actor: Actor
    time: int


class SimulatedDevice:
    """See Device. Host threads are named with `act_as`; until then everything is done by "host".

    Args:
        random: decides what runs next.
        max_actors: streams and host threads.
    """

    torch_device = torch.device("cpu")
    clock = HostClock()

    def __init__(self, random: Random, max_actors: int = 8) -> None:
        self._random = random
        self._max_actors = max_actors
        self._actors: list[Actor] = []
        self._streams: list[SimulatedStream] = []
        self._hosts: dict[str, Actor] = {}
        self._released: dict[Hashable, Clock] = {}
        self._accesses: dict[str, list[Access]] = {}  # by storage
        self._storages: dict[int, tuple[str, torch.Tensor]] = {}  # by address, which is kept from reuse
        self._host = self._host_actor("host")
        self._num_run = 0

    # Device

    def stream(self, name: str) -> SimulatedStream:
        stream = SimulatedStream(name, len(self._actors), [0] * self._max_actors)
        self._add(stream)
        self._streams.append(stream)
        return stream

    def event(self, name: str) -> SimulatedEvent:
        return SimulatedEvent(name, [0] * self._max_actors)

    def zeros(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self._track(name, torch.zeros(shape, dtype=dtype))

    def register_host(self, name: str, buffer: memoryview) -> torch.Tensor:
        return self._track(name, torch.frombuffer(buffer, dtype=torch.uint8))

    def unregister_host(self, buffer: memoryview) -> None:
        name, _ = self._storages.pop(torch.frombuffer(buffer, dtype=torch.uint8).data_ptr())
        self._accesses.pop(name, None)

    def copy(self, stream: SimulatedStream, target: torch.Tensor, source: torch.Tensor) -> None:
        self._enqueue(stream, lambda: target.copy_(source), ((source,), (target,)))

    def launch(self, stream: SimulatedStream, work: Callable[[], None], accesses: Callable[[], Accesses]) -> None:
        self._enqueue(stream, work, accesses())

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        return work

    def read_clock(self, stream: SimulatedStream, target: torch.Tensor) -> None:
        """The time is how many pieces of work have run."""
        self._enqueue(stream, lambda: target.fill_(self._num_run), ((), (target,)))

    def record(self, event: SimulatedEvent, stream: SimulatedStream) -> None:
        def fire() -> None:
            event.num_fired = number

        event.num_recorded += 1
        number = event.num_recorded
        self._join(stream, self._host.clock)
        event.clock = stream.clock.copy()
        stream.queue.append((None, fire))

    def wait(self, stream: SimulatedStream, event: SimulatedEvent) -> None:
        number = event.num_recorded
        self._join(stream, event.clock)
        stream.queue.append((lambda: event.num_fired >= number, lambda: None))

    def query(self, event: SimulatedEvent) -> bool:
        fired = event.num_fired == event.num_recorded
        if fired:
            self._join(self._host, event.clock)
        return fired

    def synchronize(self, event: SimulatedEvent) -> None:
        while event.num_fired < event.num_recorded:
            self.run_one()
        self._join(self._host, event.clock)

    def settle(self) -> None:
        while not self.is_idle:
            self.run_one()
        for stream in self._streams:
            self._join(self._host, stream.clock)

    # Methods for the simulation

    def run_one(self) -> None:
        """Run one piece of queued work, of any stream whose head is ready. Raises Deadlock if no work can run."""
        ready = [s for s in self._streams if s.queue and ((is_ready := s.queue[0][0]) is None or is_ready())]
        if not ready:
            raise Deadlock(f"nothing can run; queued: { ({s.name: len(s.queue) for s in self._streams}) }")
        stream = ready[0] if len(ready) == 1 else self._random.choice(ready)
        self._num_run += 1
        stream.queue.popleft()[1]()

    def tracked(self) -> list[torch.Tensor]:
        """Every tensor whose accesses are checked."""
        return [tensor for _, tensor in self._storages.values()]

    @property
    def is_idle(self) -> bool:
        return not any(stream.queue for stream in self._streams)

    def act_as(self, host: str) -> None:
        """From now on, what the host does is done by this thread of it."""
        self._host = self._hosts.get(host) or self._host_actor(host)

    def release(self, token: Hashable) -> None:
        """The acting thread releases a token. A thread that acquires the token is ordered behind everything that it has
        done."""
        known = self._released.get(token)
        clock = self._host.clock
        self._released[token] = clock.copy() if known is None else list(map(max, known, clock))

    def acquire(self, token: Hashable) -> None:
        """The acting thread has seen what was published under the token; nothing, if nothing was."""
        known = self._released.get(token)
        if known is not None:
            self._join(self._host, known)

    def host_access(self, storage: str, start: int, end: int, *, write: bool) -> None:
        """The acting thread reads or writes bytes [start, end) of registered memory."""
        self._host.clock[self._host.index] += 1
        self._check(self._host, storage, start, end, write)

    # Clocks

    def _host_actor(self, name: str) -> Actor:
        if name not in self._hosts:
            self._hosts[name] = self._add(Actor(name, len(self._actors), [0] * self._max_actors))
        return self._hosts[name]

    def _add(self, actor: Actor) -> Actor:
        assert len(self._actors) < self._max_actors, f"{actor.name} is one actor more than max_actors"
        self._actors.append(actor)
        return actor

    def _track(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        self._storages[tensor.untyped_storage().data_ptr()] = (name, tensor)
        return tensor

    @staticmethod
    def _join(actor: Actor, clock: Clock) -> None:
        actor.clock = list(map(max, actor.clock, clock))

    def _enqueue(self, stream: SimulatedStream, work: Callable[[], Any], accesses: Accesses) -> None:
        self._join(stream, self._host.clock)
        stream.clock[stream.index] += 1
        for tensors, is_write in zip(accesses, (False, True), strict=True):
            for tensor in tensors:
                name, _ = self._storages[tensor.untyped_storage().data_ptr()]
                assert tensor.is_contiguous(), f"an access to {name} is not one run of bytes"
                start = int(tensor.storage_offset()) * tensor.itemsize
                self._check(stream, name, start, start + tensor.nbytes, is_write)
        stream.queue.append((None, work))

    def _check(self, actor: Actor, storage: str, start: int, end: int, is_write: bool) -> None:
        """Compare with every earlier access to the same bytes, and remember this one in place of those it covers."""
        clock = actor.clock
        kept = []
        earlier = self._accesses.get(storage, [])
        for other in earlier:
            if other.start < end and start < other.end:
                if (is_write or other.is_write) and clock[other.actor.index] < other.time:
                    raise UnorderedAccess(
                        f"{actor.name} {'writes' if is_write else 'reads'} {storage}[{start}:{end}], and nothing "
                        f"orders it after {other.actor.name}'s {'write' if other.is_write else 'read'} of "
                        f"[{other.start}:{other.end}]"
                    )
                # A later access that conflicts with the other access conflicts with this one, too.
                covers = start <= other.start and other.end <= end
                if covers and (is_write or (other.actor is actor and not other.is_write)):
                    continue
            kept.append(other)
        kept.append(Access(start, end, is_write, actor, clock[actor.index]))
        self._accesses[storage] = kept
