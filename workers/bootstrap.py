"""The bootstrap that every worker receives from the launcher: its part in the engine's rings, sockets and doorbells.

The launcher derives it from the table in `pipeline/engine/topology.py`. It sends it with open descriptors over the one
socket that the worker inherits. The frame names a descriptor by its position among the descriptors that came with it.
`receive_bootstrap` replaces positions by the numbers that the kernel gave to this process.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Final, TypeVar

import msgspec

from ipc.codec import decode
from ipc.descriptor_passing import receive_with_descriptors
from ipc.doorbell import Doorbell
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
    """What every worker is given. The descriptors in it belong to the worker for its whole life."""

    role: str  # this process's name: "gateway", "tokenizer.0", ...; also its identity on every socket
    index: int = 0  # among the processes of its role: the tokenizer's number, the GPU process's rank
    epoch: int = 1  # of this process: how often it was started
    epochs: dict[str, int] = {}  # of every process of the engine, by its name
    descriptors: list[str] = []  # the key of each descriptor, by its place
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
    endpoints: dict[str, str] = {}  # of the sockets that this process binds or connects to, by name
    peers: dict[str, list[bytes]] = {}  # identities of the processes that connect to our sockets, by role
    kept: dict[str, int] = {}  # descriptors that this process only holds open

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
            kept={name: number(fd) for name, fd in self.kept.items()},
        )


def receive_bootstrap(channel: socket.socket, bootstrap_type: type[B]) -> B:
    """Wait for this process's bootstrap; its field `worker` is the WorkerBootstrap. Its descriptors are ready for use.

    Raises EngineUnavailable if the launcher ends first.
    """
    frame, descriptors = receive_with_descriptors(channel)
    bootstrap: B = decode(frame, bootstrap_type)
    worker: WorkerBootstrap = bootstrap.worker  # type: ignore[attr-defined]
    own = worker.renumbered(descriptors.__getitem__)
    return msgspec.structs.replace(bootstrap, worker=own)  # type: ignore[type-var]
