"""Limits the connections of the clients' socket: their number, those of one address, and what each sends unfinished.

libzmq accepts connections in its own thread, without a limit. If an ipc listener finds no free descriptor, libzmq
aborts the process; a tcp listener spins. libzmq reports every connection to a monitor, and blocks once 1,001 of these
events are unread. The gateway therefore keeps a reserve of descriptors: more than 1,001, or half of a small `ulimit`.

libzmq bounds a frame and the number of finished messages, but not a message of many frames: it keeps them all until the
last one arrives. So the doorkeeper asks the kernel how much each TCP connection has sent since its last message:

    received by the kernel - still in the kernel's queue - at the last message = unfinished, in libzmq's memory

A connection with more than a message may have is a suspect. The gateway then reads all finished messages, and closes
the connection if none was from the suspect. Connections over a Unix socket are of the engine's own user, and not asked.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import ipaddress
import logging
import math
import os
import resource
import socket
import struct
import termios
import threading
import time
from collections import Counter
from typing import Any, Final

import zmq

from ipc.channels import MAX_CLIENT_FRAME_BYTES
from workers.gateway.config import FrontendConfig

logger = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_MS: Final = 2_000  # libzmq disconnects a peer that has not finished ZeroMQ's handshake by then
MAX_RESERVE: Final = 2_048  # descriptors that clients may not use: more than the events that can be unread
MAX_UNFINISHED_BYTES: Final = MAX_CLIENT_FRAME_BYTES + (1 << 20)  # of one connection
MAX_ALL_UNFINISHED_BYTES: Final = 256 << 20
LOOK_MS: Final = 50  # between two looks at what TCP connections have sent
_LOOK_MS_PER_CONNECTION: Final = 0.1  # a look takes about 5 us for each: at most a twentieth of a processor
_HEARTBEAT_BYTES_PER_S: Final = 64  # ZeroMQ's own messages are not unfinished ones: about 41 with CURVE
_TRIM_AFTER_S: Final = 1.0
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER: `close` resets the connection
_LOG_EVERY_S: Final = 10.0
_MONITOR: Final = "inproc://clients.connections"
_BYTES_RECEIVED: Final = struct.Struct("=128xQ")  # tcpi_bytes_received in the kernel's struct tcp_info


class Doorkeeper:
    """Counts the connections of one socket, and closes those beyond the limits.

    Call `attach` before the socket is bound. `stats` is the gateway's page: only this class writes `num_connections`
    and `num_connections_refused`. Its thread ends with the socket's context. The gateway adds the descriptor of every
    message's connection to `delivered`. It wakes when `suspicion` is readable, and calls `close_suspects` after it has
    read all messages.
    """

    def __init__(self, endpoints: tuple[str, ...], frontend: FrontendConfig, stats: Any) -> None:
        self._paths = {endpoint.removeprefix("ipc://") for endpoint in endpoints if endpoint.startswith("ipc://")}
        self._max_connections = frontend.max_connections
        self._max_of_address = frontend.max_connections_per_address
        self._stats = stats
        self._open: dict[int, str] = {}  # addresses by descriptor; "" = exempt. After a missed close, the next
        # connection gets that number
        self._of_address: Counter[str] = Counter()
        self._taken: dict[int, int] = {}  # of a TCP connection: the bytes that libzmq had read at its last message
        self.delivered: set[int] = set()
        self._suspects: set[int] = set()
        self._closed: set[int] = set()  # by us; libzmq has not noticed yet
        self.suspicion = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._has_rung = False
        self._looked_at = 0.0
        self._trim_at = math.inf
        self._next_log = 0.0

    def attach(self, clients: zmq.Socket[Any]) -> None:
        clients.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_TIMEOUT_MS)
        clients.monitor(_MONITOR, zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        threading.Thread(target=self._run, args=(clients.context,), name="doorkeeper", daemon=True).start()

    def is_tcp(self, fd: int) -> bool:
        """Whether this is the descriptor of an open TCP connection."""
        return fd in self._taken

    def close_suspects(self) -> None:
        """Close each suspect without a message since it was suspected. All finished messages must have been read."""
        if self._has_rung:
            self._has_rung = False
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.suspicion)
        for fd in list(self._suspects):  # the other thread may forget one meanwhile
            self._suspects.discard(fd)
            if fd not in self.delivered:
                self.close(fd, "a connection that has sent more than a message may have")
                self.trim_soon()

    def close(self, fd: int, what: str, *, is_new: bool = False) -> None:
        """Close a connection of this socket, if it is still open. `is_new`: it has sent nothing yet.

        Until libzmq notices, the same connection may be found at fault again. That changes nothing.
        """
        if fd in self._closed:
            return
        self._closed.add(fd)
        self._shut_down(fd, is_new)
        self._stats.num_connections_refused[0] += 1
        if time.monotonic() >= self._next_log:
            self._next_log = time.monotonic() + _LOG_EVERY_S
            logger.warning("closing %s (%d refused so far)", what, self._stats.num_connections_refused[0])

    def trim_soon(self) -> None:
        """Give memory back to the kernel in a moment: libzmq frees a large number of frames, and malloc keeps them."""
        self._trim_at = time.monotonic() + _TRIM_AFTER_S

    def _run(self, context: zmq.Context[Any]) -> None:
        # A shadow context: another thread may destroy the process's own context, which must not close this socket.
        events: zmq.Socket[Any] = zmq.Context.shadow(context).socket(zmq.PAIR)
        events.setsockopt(zmq.RCVHWM, 1)
        events.setsockopt(zmq.LINGER, 0)
        next_look = 0.0
        with events, contextlib.suppress(zmq.ContextTerminated):
            events.connect(_MONITOR)
            while True:
                is_due = self._taken or self._trim_at < math.inf
                left_ms = max(0, round((next_look - time.monotonic()) * 1e3)) if is_due else None
                if events.poll(left_ms):
                    self._take_event(*struct.unpack("=HI", events.recv_multipart()[0]))
                if is_due and time.monotonic() >= next_look:
                    self._look()
                    if time.monotonic() >= self._trim_at:
                        self._trim_at = math.inf
                        _trim()
                    next_look = time.monotonic() + max(LOOK_MS, _LOOK_MS_PER_CONNECTION * len(self._taken)) / 1e3

    def _take_event(self, event: int, fd: int) -> None:
        address = self._open.pop(fd, "")
        if address:
            self._of_address[address] -= 1
            if not self._of_address[address]:
                del self._of_address[address]
        for each in (self.delivered, self._suspects, self._closed):
            each.discard(fd)
        self._taken.pop(fd, None)
        if event == zmq.EVENT_ACCEPTED:
            self._accepted(fd)
        self._stats.num_connections[0] = len(self._open)

    def _accepted(self, fd: int) -> None:
        address = _address_of(fd)
        self._open[fd] = "" if address is None or _is_loopback(address) else address
        if address is not None:
            self._taken[fd] = 0
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        # The kernel assigns the lowest free number, so a descriptor's number shows how many are in use.
        if len(self._open) > self._max_connections or fd >= limit - min(limit // 2, MAX_RESERVE):
            self.close(
                fd, f"a new connection: {len(self._open)} are open (frontend.max_connections {self._max_connections}, "
                f"ulimit -n {limit})", is_new=True,
            )  # fmt: skip
        elif counted := self._open[fd]:
            self._of_address[counted] += 1
            if self._of_address[counted] > self._max_of_address:
                self.close(
                    fd, f"a new connection of {counted}, which has {self._of_address[counted]} "
                    f"(frontend.max_connections_per_address {self._max_of_address})", is_new=True,
                )  # fmt: skip

    def _look(self) -> None:
        now, unfinished = time.monotonic(), {}
        heartbeats = int((now - self._looked_at) * _HEARTBEAT_BYTES_PER_S)
        self._looked_at = now
        for fd in self._taken:
            read = _bytes_read(fd)
            if fd in self.delivered:
                self.delivered.discard(fd)
                self._taken[fd] = read
            self._taken[fd] = min(read, self._taken[fd] + heartbeats)
            unfinished[fd] = read - self._taken[fd]
        suspects = {fd for fd, size in unfinished.items() if size > MAX_UNFINISHED_BYTES}
        if not suspects and sum(unfinished.values()) > MAX_ALL_UNFINISHED_BYTES:
            suspects = {max(unfinished, key=unfinished.__getitem__)}
        if suspects:
            self._suspects |= suspects
            os.eventfd_write(self.suspicion, 1)
            self._has_rung = True

    def _shut_down(self, fd: int, is_new: bool) -> None:
        if fd < 0:
            return
        with contextlib.suppress(OSError):  # the connection is closed already
            connection = socket.socket(fileno=fd)
            try:
                name = connection.getsockname()
                if connection.family != socket.AF_UNIX or name in self._paths:  # the kernel has not reused the number
                    if connection.family != socket.AF_UNIX and not is_new:
                        # The kernel's window may be closed, and then the peer would not notice a mere end.
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                    connection.shutdown(socket.SHUT_RDWR)  # libzmq notices the shutdown, and closes it
            finally:
                connection.detach()


def _address_of(fd: int) -> str | None:
    """The peer's IP address; None for a Unix socket or a closed connection."""
    try:
        connection = socket.socket(fileno=fd)
    except OSError:
        return None
    try:
        name = connection.getpeername()
        return None if connection.family == socket.AF_UNIX else str(name[0]).partition("%")[0]
    except OSError:
        return None
    finally:
        connection.detach()


def _is_loopback(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def _trim() -> None:
    with contextlib.suppress(AttributeError):  # a C library without it
        ctypes.CDLL(None).malloc_trim(0)


def _bytes_read(fd: int) -> int:
    """Of a TCP connection: the bytes that its owner has read so far. 0 if it is closed."""
    try:
        connection = socket.socket(fileno=fd)
    except OSError:
        return 0
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_RECEIVED.size)
        queued = ctypes.c_int()
        fcntl.ioctl(fd, termios.FIONREAD, queued)
        return int(_BYTES_RECEIVED.unpack(info)[0]) - queued.value
    except (OSError, struct.error):
        return 0
    finally:
        connection.detach()
