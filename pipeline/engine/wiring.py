"""What each process of an engine is given, and what changes when processes are started again. Has no effects.

A descriptor is known here by a key, such as "ring.step@1" or "doorbell.gpu". `shared_resources.py` opens a descriptor
for each key. A worker's bootstrap names a descriptor by its place in the worker's list of keys.

A process that is started again has a new epoch, and so have the rings that live with it. Its doorbell, its page of
statistics and its traces belong to its name, and stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as Collection
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import msgspec

from ipc.identity import identity_of
from ipc.ring import RingHandle
from ipc.stats_page import StatsHandle
from ipc.trace import TraceHandle
from pipeline.engine.instances import Instances, Process, RingInstance
from pipeline.engine.role_settings import EngineFacts
from pipeline.engine.topology import CONTROL, LAUNCHER, Table
from workers.bootstrap import MAIN, RingEnd, WorkerBootstrap

_FIRST_EPOCHS: Final[Mapping[str, int]] = MappingProxyType({})


@dataclass(frozen=True)
class WorkerPlan:
    """One process to start, with its bootstrap and the descriptors that the bootstrap names."""

    process: Process
    bootstrap: Any
    descriptors: tuple[str, ...]  # keys


class _Places:
    """The places of descriptors in one worker's list."""

    def __init__(self) -> None:
        self.keys: list[str] = []

    def __call__(self, key: str) -> int:
        if key not in self.keys:
            self.keys.append(key)
        return self.keys.index(key)


class Wiring:
    """A table applied to one engine.

    `epochs`: of processes that were started again, by name; the others are in their first. `died_starting`: names of
    those whose former process died before it was ready. Raises ValueError for a table that names a role that it does
    not have.
    """

    def __init__(
        self,
        table: Table,
        facts: EngineFacts,
        epochs: Mapping[str, int] = _FIRST_EPOCHS,
        died_starting: Collection[str] = frozenset(),
    ) -> None:
        self.table = table
        self.facts = facts
        self._epochs = epochs
        self._died_starting = died_starting
        self._instances = Instances(table, facts)
        self.processes = self._instances.processes
        self.rings = self._instances.rings
        self.sockets = {row.name: row for row in table.sockets}

    def names(self, roles: Iterable[str]) -> tuple[str, ...]:
        """The names of all processes of these roles."""
        return self._instances.names(roles)

    @property
    def start_sequence(self) -> tuple[Process, ...]:
        """All processes in the order in which they are spawned."""
        return tuple(sorted(self.processes, key=lambda process: process.role.start_order))

    @property
    def fronts(self) -> tuple[str, ...]:
        """The processes that answer clients, in the order in which they start."""
        return tuple(process.name for process in self.start_sequence if process.role.is_front)

    @property
    def tracks(self) -> tuple[str, ...]:
        """The traced threads in the order of the timeline: "gpu" is a main thread, "gpu.completion" a further one."""
        return tuple(track for process in self.processes for track in _tracks(process).values())

    def process(self, name: str) -> Process:
        """The process of this name."""
        return self._instances.process(name)

    def epoch(self, name: str) -> int:
        """How often this process was started."""
        return self._epochs.get(name, 1)

    @property
    def epochs(self) -> dict[str, int]:
        """Of every process."""
        return {process.name: self.epoch(process.name) for process in self.processes}

    def ring_epoch(self, ring: RingInstance) -> int:
        """How often this ring was made, or more: it grows whenever a process that it lives with is started again."""
        return 1 + sum(self.epoch(name) - 1 for name in self.names(ring.row.lives_with))

    def identity(self, name: str) -> bytes:
        """Of a process on every socket."""
        return identity_of(name, self.epoch(name))

    def after_death(
        self, dead: str, facts: EngineFacts | None = None, died_starting: Collection[str] = frozenset()
    ) -> tuple[Wiring, tuple[Process, ...]]:
        """The wiring after a process has died, and the processes to start, in order.

        `died_starting`: those among them that were not ready yet.
        """
        names = set(self.restart_group(dead))
        epochs = {name: self.epoch(name) + (name in names) for name in self.epochs}
        wiring = Wiring(self.table, facts or self.facts, epochs, died_starting)
        return wiring, tuple(process for process in self.start_sequence if process.name in names)

    def socket_epoch(self, socket: str) -> int:
        """How often this socket was made: as often as the process that binds it was started."""
        (binder,) = self.names((self.sockets[socket].bound_by,)) or (LAUNCHER,)
        return self.epoch(binder)

    def listener_key(self, socket: str) -> str:
        """Of the descriptor on which the socket's ROUTER accepts connections."""
        return f"listener.{socket}@{self.socket_epoch(socket)}"

    def socket_key(self, socket: str) -> str:
        """Of the descriptor through which processes connect to the socket."""
        return f"socket.{socket}@{self.socket_epoch(socket)}"

    def restart_group(self, name: str) -> tuple[str, ...]:
        """The processes that are started again if this one has died."""
        return self.names(self.process(name).role.restarts_with) or (name,)

    def neighbours(self, started: Collection[str]) -> tuple[Process, ...]:
        """The other processes that have a ring or a socket in common with one of these."""
        met: set[str] = set()
        for ring in self.rings:
            if not ring.parts.isdisjoint(started):
                met |= ring.parts
        for row in self.table.sockets:
            if row.name == CONTROL:
                continue
            bound, connected = set(self.names((row.bound_by,))), set(self.names(self._instances.connecting(row)))
            if not bound.isdisjoint(started):
                met |= connected
            elif not connected.isdisjoint(started):
                met |= bound
        return tuple(process for process in self.processes if process.name in met and process.name not in started)

    def plan(self, process: Process) -> WorkerPlan:
        """What this process is given at birth, and again when something that it is connected to was replaced."""
        place = _Places()
        worker = self._worker(process, place)
        worker = msgspec.structs.replace(worker, descriptors=place.keys)
        return WorkerPlan(process, process.role.bootstrap(self.facts, worker), tuple(place.keys))

    def _worker(self, process: Process, place: _Places) -> WorkerBootstrap:
        role, facts = process.role, self.facts
        bound = [row for row in self.table.sockets if row.bound_by == role.name]
        connected = [row for row in self.table.sockets if role.name in self._instances.connecting(row)]
        rings: dict[str, list[RingEnd]] = {}
        for ring in self.rings:
            if process.name in ring.parts:
                rings.setdefault(ring.row.name, []).append(self._ring_end(process, ring, place))
        traces = _tracks(process) if facts.traced else {}
        pages = self.processes if role.reads_statistics else ()
        return WorkerBootstrap(
            role=process.name,
            index=process.index,
            epoch=self.epoch(process.name),
            died_starting=sorted(self._died_starting),
            launcher_pid=facts.launcher_pid,
            outlives_launcher=role.outlives_launcher,
            log_level=facts.log_level,
            doorbell_fd=place(doorbell_key(process.name)),
            stats=_stats(process, place),
            all_stats=[_stats(each, place) for each in pages],
            traces={thread: TraceHandle(track, place(trace_key(track))) for thread, track in traces.items()},
            rings=rings,
            listeners={row.name: place(self.listener_key(row.name)) for row in bound},
            sockets={row.name: place(self.socket_key(row.name)) for row in connected},
            peers={
                peer: [self.identity(name) for name in self.names((peer,))]
                for row in bound
                for peer in self._instances.connecting(row)
            },
            kept={name: place(name) for name in role.keeps if name in facts.lent},
        )

    def _ring_end(self, process: Process, ring: RingInstance, place: _Places) -> RingEnd:
        row = ring.row
        woken: tuple[str, ...] = ()
        if process.name == ring.writer:
            woken = ring.readers if row.publish_wakes_readers else ()
        elif process.name == ring.owner and row.release_wakes_writer:
            woken = (ring.writer,)
        epoch = self.ring_epoch(ring)
        handle = RingHandle(
            ring.name, place(ring_key(ring.name, epoch)), row.num_records(self.facts), epoch, ring.index
        )
        return RingEnd(
            handle=handle,
            writes=process.name == ring.writer,
            doorbells=[place(doorbell_key(name)) for name in woken],
        )


def ring_key(ring: str, epoch: int) -> str:
    return f"ring.{ring}@{epoch}"


def doorbell_key(process: str) -> str:
    return f"doorbell.{process}"


def stats_key(process: str) -> str:
    return f"stats.{process}"


def trace_key(track: str) -> str:
    return f"trace.{track}"


def _tracks(process: Process) -> dict[str, str]:
    """A process's traced threads, and the track of each."""
    if not process.role.is_traced:
        return {}
    return {MAIN: process.name} | {thread: f"{process.name}.{thread}" for thread in process.role.threads}


def _stats(process: Process, place: Callable[[str], int]) -> StatsHandle:
    role = process.role
    return StatsHandle(process.name, place(stats_key(process.name)), role.counters, role.arrays)
