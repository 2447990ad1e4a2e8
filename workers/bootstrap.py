"""The bootstrap that every worker receives from the launcher: its part in the engine's rings, sockets and doorbells.

The launcher derives it from the table in `pipeline/engine/topology.py`. It sends it with open descriptors over the one
socket that the worker inherits: at birth, and again whenever a process was started again that the worker has a ring or
a socket in common with. The frame names a descriptor by its place in its list of keys; the packet has the descriptors
of those keys that the worker does not have yet. `BootstrapChannel` replaces places by the numbers that the kernel gave
to this process.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable
from typing import Final, Generic, TypeVar

import msgspec

from ipc.codec import decode
from ipc.descriptor_passing import receive_with_descriptors
from ipc.doorbell import Doorbell
from ipc.identity import identity_of
from ipc.record_layout import Layout, R
from ipc.ring import Ring, RingHandle
from ipc.stats_page import StatsHandle
from ipc.trace import TraceHandle

MAIN: Final = "main"  # the thread that every worker traces

B = TypeVar("B")
Handle = TypeVar("Handle", RingHandle, StatsHandle, TraceHandle)


class RingEnd(msgspec.Struct, frozen=True, kw_only=True):
    """One process's end of a ring.

    `doorbells`: of the processes to wake after each publish, if this process writes the ring; else after each release.
    """

    handle: RingHandle
    writes: bool = False
    doorbells: list[int] = []

    def attach(self, layout: Layout[R]) -> Ring[R]:
        """Raises LayoutMismatch if the ring is not as the launcher said."""
        return Ring.attach(self.handle, layout, writer=self.writes)

    def wake(self) -> None:
        """Ring the doorbells. Call it after a publish or a release."""
        for fd in self.doorbells:
            Doorbell(fd).ring()


class WorkerBootstrap(msgspec.Struct, frozen=True, kw_only=True):
    """What every worker is given. A descriptor in it belongs to the worker until a bootstrap does not name it."""

    role: str  # this process's name: "gateway", "tokenizer.0", ...
    index: int = 0  # among the processes of its role: the tokenizer's number, the GPU process's rank
    epoch: int = 1  # of this process: how often it was started
    died_starting: list[str] = []  # processes whose former one died before it was ready
    descriptors: list[str] = []  # the keys of all descriptors, by their places
    launcher_pid: int
    outlives_launcher: bool = (
        False  # True: the worker itself watches for the launcher's death; else the kernel kills it
    )
    log_level: str = "INFO"
    doorbell_fd: int
    stats: StatsHandle
    all_stats: list[StatsHandle] = []  # of every worker, for the role that reports them
    traces: dict[str, TraceHandle] = {}  # by thread; empty: nothing is traced
    rings: dict[str, list[RingEnd]] = {}  # by the ring's name in the table
    listeners: dict[str, int] = {}  # by the name of each socket that this process binds: what it accepts on
    sockets: dict[str, int] = {}  # by the name of each socket that this process connects to: what it connects through
    # Identities of the processes that connect to our sockets, by role. A message of any other identity is not from a
    # process that lives now.
    peers: dict[str, list[bytes]] = {}
    kept: dict[str, int] = {}  # descriptors that this process only holds open

    @property
    def identity(self) -> bytes:
        """Of this process, on every socket. Another process of the same name has another one."""
        return identity_of(self.role, self.epoch)

    def ring(self, name: str) -> RingEnd:
        """Our end of the one ring of this name."""
        (end,) = self.rings[name]
        return end

    def peer(self, role: str) -> bytes:
        """The identity of the one process of this role."""
        (identity,) = self.peers[role]
        return identity

    def renumbered(self, number: Callable[[int], int]) -> WorkerBootstrap:
        """The same with every descriptor's number replaced."""

        def handle(old: Handle) -> Handle:
            return msgspec.structs.replace(old, fd=number(old.fd))

        def end(old: RingEnd) -> RingEnd:
            return msgspec.structs.replace(
                old, handle=handle(old.handle), doorbells=[number(fd) for fd in old.doorbells]
            )

        return msgspec.structs.replace(
            self,
            doorbell_fd=number(self.doorbell_fd),
            stats=handle(self.stats),
            all_stats=[handle(page) for page in self.all_stats],
            traces={thread: handle(trace) for thread, trace in self.traces.items()},
            rings={name: [end(ring) for ring in rings] for name, rings in self.rings.items()},
            listeners={name: number(fd) for name, fd in self.listeners.items()},
            sockets={name: number(fd) for name, fd in self.sockets.items()},
            kept={name: number(fd) for name, fd in self.kept.items()},
        )


class BootstrapChannel(Generic[B]):
    """This process's end of the channel on which its bootstraps arrive. It stays open as long as the process lives.

    `kind` is the role's struct; its field `worker` is the WorkerBootstrap.
    """

    def __init__(self, channel: socket.socket, kind: type[B]) -> None:
        self._channel = channel
        self._kind = kind
        self._numbers: dict[str, int] = {}  # of the descriptors that this process has, by key
        self._unnamed: list[int] = []  # descriptors that the newest bootstrap does not name

    @property
    def fd(self) -> int:
        return self._channel.fileno()

    def receive(self) -> B:
        """Wait for the next bootstrap. Its descriptors are ready for use.

        Those of the former one that it does not name stay open until `close_unnamed`. Raises EngineUnavailable if the
        launcher has ended.
        """
        frame, descriptors = receive_with_descriptors(self._channel)
        bootstrap: B = decode(frame, self._kind)
        worker: WorkerBootstrap = bootstrap.worker  # type: ignore[attr-defined]
        keys = worker.descriptors
        new = [key for key in keys if key not in self._numbers]
        assert len(new) == len(descriptors), f"{len(descriptors)} descriptors came for the {len(new)} keys {new}"
        self._numbers |= zip(new, descriptors, strict=True)
        self._unnamed += [self._numbers.pop(key) for key in self._numbers.keys() - set(keys)]
        own = worker.renumbered(lambda place: self._numbers[keys[place]])
        return msgspec.structs.replace(bootstrap, worker=own)  # type: ignore[type-var]

    def has_more(self) -> bool:
        """Whether `receive` would not wait."""
        poller = select.poll()  # not select(): the descriptor's number may be large
        poller.register(self._channel, select.POLLIN)
        return bool(poller.poll(0))

    def close_unnamed(self) -> None:
        """Close the descriptors that the newest bootstrap does not name. Mappings of their memory stay valid."""
        for fd in self._unnamed:
            os.close(fd)
        self._unnamed.clear()
