"""A client's socket on an asyncio loop. Sends and receives frames, and reports when the engine comes and goes.

Everything runs in the loop's thread. ZeroMQ's descriptor is edge-triggered, so after every receive and send the
connection asks the socket whether more frames have arrived. A forked child must not use the connection: ZeroMQ's
threads do not run there, and the child shares its descriptors with the parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket as sockets
from collections.abc import Callable
from typing import Any, Final

import zmq
from zmq.utils.monitor import recv_monitor_message

from ipc.channels import connect_dealer
from pipeline.client.callbacks import weakly
from pipeline.client.keys import ClientKeys
from pipeline.environment import forks
from pipeline.environment.descriptors import check_room, hold_standard_descriptors

_FAILED: Final = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
_EVENTS: Final = zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | _FAILED
_RETRY_REFUSED_S: Final = 0.5  # ZeroMQ itself does not connect again after a refusal
_NUM_DESCRIPTORS: Final = 20  # about a dozen, with some to spare
_BURST: Final = 256  # frames read before other tasks of the loop can run


class Connection:
    """A DEALER socket. If its engine goes, a new socket replaces it, so that no frame for one engine reaches the next.

    `on_frames` gets the frames that have arrived, in order. `on_up` is called after the engine has come, and `on_down`
    after it has gone and `on_frames` has got its last frames. In between, ZeroMQ keeps trying to connect. The loop
    refers to the connection until it is closed. `refusal` says why the last handshake failed; "" = it did not. The
    connection tries again after a moment, because the engine's keys may change. Raises EngineUnavailable if too few
    descriptors are free.
    """

    def __init__(
        self,
        endpoint: str,
        loop: asyncio.AbstractEventLoop,
        keys: ClientKeys,
        *,
        on_frames: Callable[[list[bytes]], None],
        on_up: Callable[[], None],
        on_down: Callable[[], None],
    ) -> None:
        self.is_up = False
        self.refusal = ""
        self._endpoint = endpoint
        self._keys = keys
        self._loop = loop
        self._on_frames = on_frames
        self._on_up = on_up
        self._on_down = on_down
        self._again_scheduled = False
        self._closed = False
        self._transport_fd: int | None = None
        hold_standard_descriptors()
        check_room(_NUM_DESCRIPTORS, "a connection to an engine")
        self._context: zmq.Context[Any] = zmq.Context()
        forks.register(self)
        self._open()

    def send(self, frame: bytes) -> None:
        """Queue a frame. Never blocks."""
        self._socket.send(frame)
        self._look_again_if_needed()

    def close(self, *, flush: bool = True) -> None:
        """Close. With `flush`, frames for a living engine are sent first, for at most the socket's linger time."""
        if not self._closed:
            self._closed = True
            self._close_socket(linger_ms=None if self.is_up and flush else 0)
            self._context.term()
            self.is_up = False

    def drop(self) -> None:
        """Close without flushing, from any thread. For the finalizer of a client."""
        if self._closed:
            return
        if self._loop.is_running():
            with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile, and drops the connection
                self._loop.call_soon_threadsafe(self._close_dropped)
        else:
            self._close_dropped()

    def forget_parent(self) -> None:
        """In a forked child: close the inherited descriptor, so that the engine notices when the parent dies."""
        self._closed, self.is_up = True, False
        if self._transport_fd is not None:
            _close_connection_to(self._endpoint, self._transport_fd)

    def _open(self) -> None:
        self._socket = connect_dealer(self._context, self._endpoint, prepare=self._prepare)
        self._loop.add_reader(_option(self._socket, zmq.FD), self._take_frames)
        self._loop.add_reader(_option(self._monitor, zmq.FD), self._take_events)
        self._loop.call_soon(self._take_events)  # events from before the readers were added

    def _prepare(self, socket: zmq.Socket[Any]) -> None:
        self._keys.apply(socket)
        self._monitor: zmq.Socket[Any] = socket.get_monitor_socket(_EVENTS)

    def _close_dropped(self) -> None:
        self.close(flush=False)

    def _close_socket(self, linger_ms: int | None) -> None:
        if not self._loop.is_closed():
            self._loop.remove_reader(_option(self._socket, zmq.FD))
            self._loop.remove_reader(_option(self._monitor, zmq.FD))
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(linger_ms)

    def _take_frames(self) -> None:
        if self._closed:
            return
        self._again_scheduled = False
        self._hand_over(_BURST)
        if not self._closed:
            self._look_again_if_needed()

    def _hand_over(self, limit: int | None) -> None:
        frames: list[bytes] = []
        try:
            while limit is None or len(frames) < limit:
                frames.append(self._socket.recv(zmq.DONTWAIT))
        except zmq.Again:
            pass
        if frames:
            self._on_frames(frames)

    def _look_again_if_needed(self) -> None:
        if not self._again_scheduled and not self._loop.is_closed() and _option(self._socket, zmq.EVENTS) & zmq.POLLIN:
            self._again_scheduled = True
            self._loop.call_soon(self._take_frames)

    def _take_events(self) -> None:
        while not self._closed and _option(self._monitor, zmq.EVENTS) & zmq.POLLIN:
            message = recv_monitor_message(self._monitor, zmq.DONTWAIT)
            event = message["event"]
            if event == zmq.EVENT_CONNECTED:
                self._transport_fd = message["value"]
                continue
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.is_up, self.refusal = True, ""
                self._on_up()
                continue
            if event & _FAILED:
                self.refusal = self._keys.explain(event)
                self._loop.call_later(_RETRY_REFUSED_S, weakly(self._retry), self._socket)
                continue
            self._transport_fd = None
            if self.is_up:
                self._hand_over(None)  # its last frames: their errors say more than ours
                self.is_up = False
                self._close_socket(linger_ms=0)
                self._open()
                self._on_down()
                return

    def _retry(self, refused: zmq.Socket[Any]) -> None:
        if not self._closed and not self.is_up and self._socket is refused:
            self._close_socket(linger_ms=0)
            self._open()


def _option(socket: zmq.Socket[Any], option: int) -> int:
    value = socket.getsockopt(option)
    assert isinstance(value, int), f"socket option {option} is an integer"
    return value


def _close_connection_to(endpoint: str, fd: int) -> None:
    """Close a descriptor if it is still a connection to the endpoint: the kernel may have reused its number."""
    with contextlib.suppress(OSError):
        transport = sockets.socket(fileno=fd)
        try:
            peer = transport.getpeername()
            is_it = f"ipc://{peer}" == endpoint if isinstance(peer, str) else endpoint.endswith(f":{peer[1]}")
        except OSError:
            is_it = False
        if is_it:
            transport.close()
        else:
            transport.detach()
