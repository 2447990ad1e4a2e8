"""Limits the connections of the clients' socket, so that clients cannot use up the process's descriptors.

libzmq accepts connections in its own thread, without a limit. If an ipc listener finds no free descriptor, libzmq
aborts the process; a tcp listener spins. libzmq reports every connection to a monitor, and blocks once 1,001 of these
events are unread. The gateway therefore keeps a reserve of descriptors: more than 1,001, or half of a small `ulimit`.
"""

from __future__ import annotations

import contextlib
import logging
import resource
import socket
import struct
import threading
import time
from typing import Any, Final

import zmq

logger = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_MS: Final = 2_000  # libzmq disconnects a peer that has not finished ZeroMQ's handshake by then
MAX_RESERVE: Final = 2_048  # descriptors that clients may not use: more than the events that can be unread
_LOG_EVERY_S: Final = 10.0
_MONITOR: Final = "inproc://clients.connections"
_IPC: Final = "ipc://"


class Doorkeeper:
    """Counts the connections of one socket, and closes new ones beyond the limit.

    Call `attach` before the socket is bound. `stats` is the gateway's page: only this class writes `num_connections`
    and `num_connections_refused`. Its thread ends with the socket's context.
    """

    def __init__(self, endpoint: str, max_connections: int, stats: Any) -> None:
        self._path = endpoint.removeprefix(_IPC) if endpoint.startswith(_IPC) else None
        self._max_connections = max_connections
        self._stats = stats
        self._open: set[int] = set()  # descriptors; after a missed close, the next connection gets that number
        self._next_log = 0.0

    def attach(self, clients: zmq.Socket[Any]) -> None:
        clients.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_TIMEOUT_MS)
        clients.monitor(_MONITOR, zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        threading.Thread(target=self._run, args=(clients.context,), name="doorkeeper", daemon=True).start()

    def _run(self, context: zmq.Context[Any]) -> None:
        # A shadow context: another thread may destroy the process's own context, which must not close this socket.
        events: zmq.Socket[Any] = zmq.Context.shadow(context).socket(zmq.PAIR)
        events.setsockopt(zmq.RCVHWM, 1)
        events.setsockopt(zmq.LINGER, 0)
        with events, contextlib.suppress(zmq.ContextTerminated):
            events.connect(_MONITOR)
            while True:
                event, fd = struct.unpack("=HI", events.recv_multipart()[0])
                if event == zmq.EVENT_ACCEPTED:
                    self._accepted(fd)
                else:
                    self._open.discard(fd)
                self._stats.num_connections[0] = len(self._open)

    def _accepted(self, fd: int) -> None:
        self._open.add(fd)
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        # The kernel assigns the lowest free number, so a descriptor's number shows how many are in use.
        if len(self._open) > self._max_connections or fd >= limit - min(limit // 2, MAX_RESERVE):
            self._refuse(fd, limit)

    def _refuse(self, fd: int, limit: int) -> None:
        with contextlib.suppress(OSError):  # the connection is closed already
            connection = socket.socket(fileno=fd)
            try:
                if self._path is None or connection.getsockname() == self._path:  # the kernel has not reused the number
                    connection.shutdown(socket.SHUT_RDWR)  # libzmq notices the shutdown, and closes it
            finally:
                connection.detach()
        self._stats.num_connections_refused[0] += 1
        if time.monotonic() >= self._next_log:
            self._next_log = time.monotonic() + _LOG_EVERY_S
            logger.warning(
                "refusing connections: %d are open (frontend.max_connections %d, ulimit -n %d; %d refused so far)",
                len(self._open), self._max_connections, limit, self._stats.num_connections_refused[0],
            )  # fmt: skip
