"""The socket that clients connect to: binds it, reads clients' messages within bounds, and keeps strangers out.

It listens on the endpoint. If that is a TCP address, it also listens on a Unix socket in the engine's private folder,
for the engine's own HTTP processes and the program that launched the engine: they need no keys.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from typing import Any, Final

import zmq

from ipc.channels import bind_further, bind_router
from ipc.codec import MAX_FRAME_BYTES
from workers.gateway.client_frames import MAX_FRAMES
from workers.gateway.client_keys import Curve
from workers.gateway.config import GatewayBootstrap, max_unread_messages
from workers.gateway.connection_limit import Doorkeeper
from workers.process import WorkerProcess

MAX_READ_AHEAD: Final = 16  # messages of one client that libzmq reads ahead; each may have a large prompt
_MAX_STEPS: Final = 1_000  # messages read, and frames dropped, in one turn


class ClientsSocket:
    """A ROUTER for clients. `sources` are what to wait for; after each wake-up call `read`, until it yields no more.

    libzmq disconnects a client without an answer if a frame exceeds MAX_FRAME_BYTES. The core refuses a message of more
    than MAX_CLIENT_FRAME_BYTES, which is less, with a text. Raises ConfigError for keys that cannot be used, and
    EngineUnavailable if an endpoint cannot be bound.
    """

    def __init__(self, process: WorkerProcess, bootstrap: GatewayBootstrap) -> None:
        frontend, endpoint = bootstrap.frontend, bootstrap.endpoint
        is_tcp = bootstrap.local_endpoint != endpoint
        self._doorkeeper = Doorkeeper((bootstrap.local_endpoint, endpoint), frontend, process.stats)
        self._curve: Curve | None = None
        if is_tcp and frontend.server_key_file is not None and frontend.client_keys_folder is not None:
            self._curve = Curve(process.context, frontend.server_key_file, frontend.client_keys_folder)
        before = os.umask(0o177)  # only this user may connect to a file
        try:
            self.router = bind_router(
                process.context,
                bootstrap.local_endpoint,
                max_frame_bytes=MAX_FRAME_BYTES,
                handover=False,
                send_mark=max_unread_messages(bootstrap),
                receive_mark=MAX_READ_AHEAD,
                prepare=self._doorkeeper.attach,
            )
        finally:
            os.umask(before)
        if is_tcp:
            bind_further(self.router, endpoint, prepare=None if self._curve is None else self._curve.apply)
        self._has_tcp = is_tcp
        self._dropping = False  # the rest of a message with too many frames

    @property
    def sources(self) -> tuple[zmq.Socket[Any] | int, ...]:
        curve = () if self._curve is None else (self._curve.requests,)
        return (self.router, self._doorkeeper.suspicion, *curve)

    def read(self, ready: Collection[Any]) -> Iterator[list[bytes]]:
        """Yield [identity, frame...] of the messages that have arrived, one of each client in turn, without waiting.

        Of a message with more than MAX_FRAMES frames only the first ones are yielded. The others are dropped without
        being kept, a bounded number in each call, and the client is disconnected. `ready`: the sources with something
        to read.
        """
        if self._curve is not None and self._curve.requests in ready:
            self._curve.answer()
        try:
            for _ in range(_MAX_STEPS):
                if self._dropping:
                    self._dropping = self.router.recv(zmq.DONTWAIT, copy=False).more
                    if not self._dropping:
                        self._doorkeeper.trim_soon()
                elif frames := self._receive():
                    yield frames
        except zmq.Again:
            self._doorkeeper.close_suspects()

    def _receive(self) -> list[bytes] | None:
        """The next message. None if its client may not send any more. Raises zmq.Again if there is none."""
        head = self.router.recv(zmq.DONTWAIT, copy=False)
        frames, has_more = [head.bytes], head.more
        while has_more and len(frames) <= MAX_FRAMES:
            frames.append(self.router.recv(zmq.DONTWAIT))
            has_more = bool(self.router.getsockopt(zmq.RCVMORE))
        self._dropping = has_more
        if self._has_tcp and not self._may_send(head):
            return None
        if has_more:
            self._doorkeeper.close(
                _connection_of(head), "the connection of a client that sends messages of many frames"
            )
        return frames

    def _may_send(self, head: zmq.Frame) -> bool:
        """Whether the client may send: its key is still allowed. Otherwise this closes its connection.

        The doorkeeper hears that the connection has delivered a message.
        """
        fd = _connection_of(head)
        if not self._doorkeeper.is_tcp(fd):
            return True
        self._doorkeeper.delivered.add(fd)
        if self._curve is None or self._curve.allowed.name_of(str(head.get("User-Id")).encode()) is not None:
            return True
        self._doorkeeper.close(
            fd, "the connection of a client whose key is not in frontend.client_keys_folder any more"
        )
        return False


def _connection_of(head: zmq.Frame) -> int:
    """The descriptor of the connection that a frame came from. -1 if libzmq does not know: peers of ZMTP 1 and 2."""
    try:
        fd: int = head.get(zmq.SRCFD)
    except zmq.ZMQError:
        return -1
    return fd
