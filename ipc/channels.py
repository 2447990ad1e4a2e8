"""ZeroMQ sockets with the options that ringfeed relies on, and typed sends and receives over them.

No socket here drops in silence: ROUTERs are mandatory-routing (a send to nobody says so), DEALERs queue without a
high-water mark (libzmq loses messages at an orderly close over ipc when a receive mark is set: its issue 4660), and the
bounds come from credits and bounded queues in the protocol itself. A ROUTER gives an identity to its newest holder
(otherwise it ignores a restarted worker while messages of the dead one are unread); what the former holder has sent
still arrives, perhaps under another identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import zmq

from ipc.codec import MAX_FRAME_BYTES, decode, encode
from ipc.errors import ConfigError, EngineUnavailable

MAX_CLIENT_FRAME_BYTES: Final = 16 << 20
MAX_IPC_PATH_BYTES: Final = 107  # of a Unix socket's path
_HEARTBEAT_MS: Final = 2_000
_HEARTBEAT_TIMEOUT_MS: Final = 30_000


def bind_router(
    context: zmq.Context[Any], endpoint: str, *, max_frame_bytes: int = MAX_FRAME_BYTES, handover: bool = True
) -> zmq.Socket[Any]:
    """A bound ROUTER. Raises EngineUnavailable, with the endpoint, if it cannot be bound.

    With `handover` a new peer takes over the identity of an old one: a restarted worker does. Among clients, who choose
    theirs freely, nobody may.
    """
    socket: zmq.Socket[Any] = context.socket(zmq.ROUTER)
    _set_common_options(socket, endpoint, max_frame_bytes)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.ROUTER_HANDOVER, int(handover))
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        socket.close(0)
        raise EngineUnavailable(f"cannot listen on {endpoint}: {error.strerror or error}") from None
    return socket


def connect_dealer(
    context: zmq.Context[Any],
    endpoint: str,
    *,
    identity: bytes | None = None,
    prepare: Callable[[zmq.Socket[Any]], None] | None = None,
) -> zmq.Socket[Any]:
    """A connected DEALER; messages sent before the peer is there wait for it. Raises ConfigError for no endpoint.

    `prepare` gets the socket before it connects: a monitor that is attached later may miss the connection.
    """
    socket: zmq.Socket[Any] = context.socket(zmq.DEALER)
    _set_common_options(socket, endpoint, MAX_FRAME_BYTES)
    if identity is not None:
        socket.setsockopt(zmq.IDENTITY, identity)
    if prepare is not None:
        prepare(socket)
    try:
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        socket.close(0)
        raise ConfigError(
            f"cannot connect to {endpoint!r} ({error.strerror or error}): give ipc://PATH or tcp://HOST:PORT"
        ) from None
    return socket


def _set_common_options(socket: zmq.Socket[Any], endpoint: str, max_frame_bytes: int) -> None:
    for option, value in (
        (zmq.SNDHWM, 0),
        (zmq.RCVHWM, 0),
        (zmq.LINGER, 1_000),
        (zmq.MAXMSGSIZE, max_frame_bytes),
        (zmq.IPV6, int(endpoint.startswith("tcp://["))),  # with it "*" and an interface's name would mean IPv6 as well
    ):
        socket.setsockopt(option, value)
    if endpoint.startswith("tcp:"):  # ipc shows death by itself, and must not take a frozen peer for a dead one
        socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)


def send(socket: zmq.Socket[Any], message: Any) -> None:
    """Queue a message on a DEALER. Never blocks."""
    socket.send(encode(message), copy=True)


def send_to(socket: zmq.Socket[Any], identity: bytes, message: Any) -> bool:
    """Queue a message for one peer of a ROUTER. False if that peer is gone."""
    return send_frames_to(socket, identity, encode(message))


def send_frames_to(socket: zmq.Socket[Any], identity: bytes, *frames: bytes) -> bool:
    """The same for frames that are encoded already."""
    try:
        socket.send_multipart((identity, *frames), flags=zmq.DONTWAIT, copy=True)
    except zmq.ZMQError as error:
        if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
            return False
        raise
    return True


def receive_frames(socket: zmq.Socket[Any], limit: int = 1_000) -> Iterator[list[bytes]]:
    """Multipart messages that have arrived, at most `limit`, without waiting.

    Drain a socket before sleeping on it: ZeroMQ's descriptors are edge-triggered.
    """
    for _ in range(limit):
        try:
            yield socket.recv_multipart(zmq.DONTWAIT)
        except zmq.Again:
            return


def receive(socket: zmq.Socket[Any], kind: Any, limit: int = 1_000) -> Iterator[Any]:
    """Messages that have arrived on a DEALER from a trusted peer (a bad one raises ProtocolError)."""
    for frames in receive_frames(socket, limit):
        yield decode(frames[-1], kind)


def receive_from(socket: zmq.Socket[Any], kind: Any, limit: int = 1_000) -> Iterator[tuple[bytes, Any]]:
    """(identity, message) pairs that have arrived on a ROUTER from trusted peers."""
    for frames in receive_frames(socket, limit):
        yield frames[0], decode(frames[-1], kind)
