"""The gateway process: its sockets and its loop. `core.py` decides what it says.

If the launcher dies, the gateway lives a moment longer, to answer the clients and to remove the endpoint.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final

from ipc.channels import (
    SendResult,
    receive,
    receive_frames,
    receive_from,
    send_frames_to,
    try_send_to,
)
from ipc.codec import decode, encode
from ipc.errors import ConfigError, EngineUnavailable, Interrupted
from ipc.messages import (
    Abort,
    Accepted,
    Delivery,
    Drain,
    EngineState,
    Fenced,
    SchedulerToGateway,
    Start,
    TokenizeDone,
    Withdrawn,
)
from ipc.stats_page import StatsPage
from ipc.trace import Span
from workers.gateway.clients_socket import ClientsSocket
from workers.gateway.config import GatewayBootstrap
from workers.gateway.core import Gateway
from workers.gateway.outbox import Peer
from workers.gateway.queries import RoleArrays, RoleStats
from workers.process import StopWorker, WorkerProcess

logger = logging.getLogger(__name__)

CLIENT_TURN_S: Final = 0.002  # for clients' messages, before the engine's are read: a flood delays outputs by this much
MAX_SLEEP_MS: Final = 3_600_000  # `poll` cannot take time-outs of months
_IPC: Final = "ipc://"
_LAUNCHER_DIED = "the engine's launcher died"


def run(process: WorkerProcess, bootstrap: GatewayBootstrap) -> None:
    """Serve until Stop, or until the launcher dies."""
    try:
        GatewayWorker(process, bootstrap, _watch_launcher(bootstrap)).serve()
    finally:
        Path(bootstrap.local_endpoint.removeprefix(_IPC)).unlink(missing_ok=True)
        if bootstrap.endpoint_folder is not None:
            with contextlib.suppress(OSError):  # not empty: another engine of this user listens in it
                Path(bootstrap.endpoint_folder).rmdir()


class LauncherDied(EngineUnavailable):
    """The launcher has ended without telling its workers."""

    def __init__(self) -> None:
        super().__init__(_LAUNCHER_DIED)


class GatewayWorker:
    """Binds and connects the sockets, and carries messages between them and the core."""

    def __init__(self, process: WorkerProcess, bootstrap: GatewayBootstrap, launcher_fd: int) -> None:
        self.process = process
        self.bootstrap = bootstrap
        self.launcher_fd = launcher_fd
        self.peers = bootstrap.worker.peers  # identities of the live processes that connect to us, by role
        self._pages = [StatsPage(handle) for handle in bootstrap.worker.all_stats]
        self.core = Gateway(bootstrap, self._snapshot_stats)
        if bootstrap.endpoint_folder is not None:
            _keep_folder(Path(bootstrap.endpoint_folder))
        self.clients = ClientsSocket(process, bootstrap)
        self.tokenizers = process.bind("tokenize")
        self.deliveries = process.bind("deliver")
        self.scheduler = process.connect("schedule")
        self.detokenizer = process.connect("detokenize")
        sockets = (self.tokenizers, self.deliveries, self.scheduler)
        for source in (*self.clients.sources, *sockets, launcher_fd):
            process.watch(source)
        process.on_control(self._on_control)
        process.on_rewire(self._on_rewire)

    def serve(self) -> None:
        """Run until an exception ends the loop. Every open request is answered first."""
        try:
            self._loop()
        except StopWorker:
            self.core.abort(EngineUnavailable("the engine was stopped before this request was finished"))
            raise
        except Exception:
            self.core.abort(Interrupted("the engine's gateway failed"))
            raise
        finally:
            self._flush()

    def _loop(self) -> None:
        core, trace = self.core, self.process.trace
        self.process.ready()
        while True:
            timeout_s = core.timeout_s(time.monotonic())
            ready = self.process.wait(None if timeout_s is None else min(MAX_SLEEP_MS, math.ceil(timeout_s * 1_000)))
            now = time.monotonic()
            self._read_workers(now)
            self._read_clients(ready, now)
            core.tick(now)
            if self.launcher_fd in ready:
                self._end_without_launcher()
            with trace[Span.SEND]:
                self._flush()
            self._count()

    def _read_workers(self, now: float) -> None:
        core, trace = self.core, self.process.trace
        for frames in receive_frames(self.deliveries):
            if not self._is_alive("detokenizer", frames[0]):
                continue
            with trace[Span.DELIVER]:
                core.delivery(decode(frames[1], Delivery), frames[2:], now)
        self._read_scheduler(now)
        for identity, done in receive_from(self.tokenizers, TokenizeDone):
            if not self._is_alive("tokenizer", identity):
                continue
            core.tokenizer_done(identity, done.key, now)
            if done.answer is not None or done.error_code:
                core.answered(done, now)

    def _read_scheduler(self, now: float) -> None:
        core = self.core
        for message in receive(self.scheduler, SchedulerToGateway):
            if isinstance(message, Accepted):
                core.accepted(message.keys)
            elif isinstance(message, Withdrawn):
                core.withdrawn(message.keys, now)
            elif isinstance(message, Fenced):
                core.recovery.fenced(message.tokenizer, now)
            else:
                core.cache_cleared(message.query_id, now)

    def _is_alive(self, role: str, identity: bytes) -> bool:
        """Whether this is a process that lives. A message of a dead one may still arrive."""
        if identity not in self.peers[role]:
            self.process.take_bootstraps()
        return identity in self.peers[role]

    def _read_clients(self, ready: Collection[Any], now: float) -> None:
        core, trace = self.core, self.process.trace
        turn_ends = time.monotonic() + CLIENT_TURN_S
        for frames in self.clients.read(ready):
            with trace[Span.REQUEST]:
                core.client_frames(frames[0], frames[1:], now)
            if time.monotonic() >= turn_ends:
                break

    def _snapshot_stats(self, names: Sequence[str]) -> tuple[RoleStats, RoleArrays]:
        arrays = {page.role: page.copy_arrays(names) for page in self._pages} if names else {}
        return {page.role: page.snapshot() for page in self._pages}, {role: of for role, of in arrays.items() if of}

    def _on_rewire(self, bootstrap: GatewayBootstrap) -> None:
        """Processes were started again. If the scheduler was, then all processes between it and us were."""
        before, self.peers, now = self.peers, bootstrap.worker.peers, time.monotonic()
        if before["detokenizer"] != self.peers["detokenizer"]:
            self._read_scheduler(now)  # the dead one's last words
            self.scheduler = self.process.reconnect("schedule", self.scheduler)
            self.detokenizer = self.process.reconnect("detokenize", self.detokenizer)
            self.process.watch(self.scheduler)
            self.core.recovery.core_replaced(now)
            return
        for identity in set(before["tokenizer"]) - set(self.peers["tokenizer"]):
            self.core.recovery.tokenizer_replaced(identity, now)

    def _on_control(self, message: Start | Drain | Abort | EngineState) -> None:
        if isinstance(message, Start):
            self.core.serving.start(time.monotonic())
            self.process.ready()  # a second time: from now on the gateway takes requests
        elif isinstance(message, Drain):
            self.core.serving.drain(time.monotonic())
        elif isinstance(message, EngineState):
            self.core.serving.engine_state(message.state, message.detail, time.monotonic())
        else:
            self.core.abort(EngineUnavailable(message.error_message))

    def _flush(self) -> None:
        while outbox := self.core.take_outbox():
            for peer, identity, message in outbox:
                frame = message if isinstance(message, bytes) else encode(message)
                if peer is Peer.CLIENT:
                    result = try_send_to(self.clients.router, identity, frame)
                    if result is SendResult.GONE:
                        self.core.client_gone(identity)  # adds messages to the outbox
                    elif result is SendResult.FULL:
                        self.core.client_full(identity, message)  # adds messages too
                elif peer is Peer.TOKENIZER:
                    if not send_frames_to(self.tokenizers, identity, frame):
                        self.core.requests.prompts.unreachable(identity, message.key)
                elif peer is Peer.LAUNCHER:
                    self.process.say(message)
                else:
                    (self.scheduler if peer is Peer.SCHEDULER else self.detokenizer).send(frame)

    def _count(self) -> None:
        core, requests, stats = self.core, self.core.requests, self.process.stats
        stats.num_open[0] = len(core.table)
        stats.num_clients[0] = len(core.table.clients)
        stats.num_received[0] = core.num_received
        stats.num_refused[0] = core.num_refused
        stats.num_finished[0] = requests.num_finished
        stats.num_cancelled[0] = requests.num_cancelled
        stats.num_waiting[0] = requests.prompts.num_waiting
        stats.num_queue_full[0] = core.num_queue_full
        stats.num_kept_bytes[0] = core.kept.num_bytes
        stats.num_deadline[0] = requests.num_out_of_time["deadline"]
        stats.num_queue_timeout[0] = requests.num_out_of_time["queue_timeout"]

    def _end_without_launcher(self) -> None:
        self.core.abort(Interrupted(_LAUNCHER_DIED))
        raise LauncherDied


def _keep_folder(folder: Path) -> None:
    """Make the folder again: another engine of this user that has just ended may have removed it as empty."""
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.lstat().st_uid != os.getuid():
        raise ConfigError(f"{folder} belongs to another user")


def _watch_launcher(bootstrap: GatewayBootstrap) -> int:
    """A descriptor that is readable once the launcher is dead."""
    try:
        fd = os.pidfd_open(bootstrap.worker.launcher_pid)
    except ProcessLookupError:
        raise LauncherDied from None
    if os.getppid() != bootstrap.worker.launcher_pid:  # another process has this number by now
        raise LauncherDied
    return fd
