"""ZeroMQ sockets with the options that ringfeed relies on, and typed sends and receives over them.

No socket here loses a message silently. ROUTERs are mandatory-routing, so a send to a peer that has gone reports it.
Sockets inside the engine have no high-water mark, because libzmq loses messages at an orderly close over ipc if a
receive mark is set (libzmq issue 4660); credits and bounded queues in the protocol limit what they hold. Only the
clients' socket has marks, because an untrusted client may ignore flow control. A client that closes needs no answers,
so no message that matters is lost there.

A ROUTER gives an identity to its newest holder; otherwise it would ignore a restarted worker while messages of the dead
one are unread. Messages of the former holder still arrive, perhaps under another identity.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Iterator
from typing import Any, Final

import zmq

from ipc.codec import MAX_FRAME_BYTES, decode, encode
from ipc.errors import ConfigError, EngineUnavailable
from ipc.private_socket import endpoint_through

MAX_CLIENT_FRAME_BYTES: Final = 16 << 20
MAX_IPC_PATH_BYTES: Final = 107  # the kernel's limit for the path of a Unix socket
_HEARTBEAT_MS: Final = 2_000
_HEARTBEAT_TIMEOUT_MS: Final = 30_000


class SendResult(enum.Enum):
    """The result of a send to one peer of a ROUTER."""

    QUEUED = "queued"
    FULL = "full"  # the peer is connected, and its queue has reached the send mark
    GONE = "gone"


def bind_router(
    context: zmq.Context[Any],
    endpoint: str,
    *,
    max_frame_bytes: int = MAX_FRAME_BYTES,
    handover: bool = True,
    send_mark: int = 0,
    receive_mark: int = 0,
    listener_fd: int | None = None,
    prepare: Callable[[zmq.Socket[Any]], None] | None = None,
) -> zmq.Socket[Any]:
    """A bound ROUTER. Raises EngineUnavailable, with the endpoint, if it cannot be bound.

    With `handover` a new peer takes over the identity of an old one, as a restarted worker does. Clients choose their
    identities freely, so they get no handover. `send_mark` and `receive_mark` bound the messages queued to and from one
    peer (0 = no bound). At the send mark a send is FULL until the peer has read half of the queue. At the receive mark
    the socket stops reading from the peer, whose messages stay on its own side. With `listener_fd` the ROUTER accepts
    on this listening socket, which stays the caller's, and `endpoint` is only its name. `prepare` gets the socket
    before it is bound.
    """
    socket: zmq.Socket[Any] = context.socket(zmq.ROUTER)
    _set_common_options(socket, endpoint, max_frame_bytes, send_mark, receive_mark)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.ROUTER_HANDOVER, int(handover))
    if listener_fd is not None:
        socket.setsockopt(zmq.USE_FD, os.dup(listener_fd))
    _bind(socket, endpoint, prepare)
    return socket


def bind_further(
    socket: zmq.Socket[Any], endpoint: str, *, prepare: Callable[[zmq.Socket[Any]], None] | None = None
) -> None:
    """Bind a bound ROUTER to a second endpoint. Options that `prepare` sets do not apply to the first one.

    Raises EngineUnavailable, with the endpoint, if it cannot be bound.
    """
    _set_transport_options(socket, endpoint)
    _bind(socket, endpoint, prepare)


def _bind(socket: zmq.Socket[Any], endpoint: str, prepare: Callable[[zmq.Socket[Any]], None] | None) -> None:
    if prepare is not None:
        prepare(socket)
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        socket.close(0)
        raise EngineUnavailable(f"cannot listen on {endpoint}: {error.strerror or error}") from None


def bind_private_router(context: zmq.Context[Any], listener_fd: int) -> zmq.Socket[Any]:
    """A ROUTER on a socket of `ipc/private_socket.py`. `listener_fd` stays the caller's."""
    return bind_router(context, endpoint_through(listener_fd), listener_fd=listener_fd)


def connect_dealer(
    context: zmq.Context[Any],
    endpoint: str,
    *,
    identity: bytes | None = None,
    prepare: Callable[[zmq.Socket[Any]], None] | None = None,
) -> zmq.Socket[Any]:
    """A connected DEALER. Messages sent before the peer listens wait for it.

    `prepare` receives the socket before it connects: a monitor that is attached later may miss the connection. Raises
    ConfigError for an endpoint of another form.
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


def _set_common_options(
    socket: zmq.Socket[Any], endpoint: str, max_frame_bytes: int, send_mark: int = 0, receive_mark: int = 0
) -> None:
    for option, value in (
        (zmq.SNDHWM, send_mark),
        (zmq.RCVHWM, receive_mark),
        (zmq.LINGER, 1_000),
        (zmq.MAXMSGSIZE, max_frame_bytes),
    ):
        socket.setsockopt(option, value)
    _set_transport_options(socket, endpoint)


def _set_transport_options(socket: zmq.Socket[Any], endpoint: str) -> None:
    # With IPV6 "*" and an interface's name would mean IPv6 as well.
    socket.setsockopt(zmq.IPV6, int(endpoint.startswith("tcp://[")))
    if endpoint.startswith("tcp:"):  # over ipc the kernel reports a peer's death, and a stopped peer is not dead
        socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)


def send(socket: zmq.Socket[Any], message: Any) -> None:
    """Queue a message on a DEALER. Never blocks."""
    socket.send(encode(message), copy=True)


def send_to(socket: zmq.Socket[Any], identity: bytes, message: Any) -> bool:
    """Queue a message for one peer of a ROUTER. False if that peer is gone."""
    return send_frames_to(socket, identity, encode(message))


def send_frames_to(socket: zmq.Socket[Any], identity: bytes, *frames: bytes) -> bool:
    """Like `send_to`, for frames that are encoded already."""
    return try_send_to(socket, identity, *frames) is SendResult.QUEUED


def try_send_to(socket: zmq.Socket[Any], identity: bytes, *frames: bytes) -> SendResult:
    """Like `send_frames_to`, for a ROUTER with a send mark. Queues all frames or none. Never blocks."""
    try:
        socket.send_multipart((identity, *frames), flags=zmq.DONTWAIT, copy=True)
    except zmq.Again:
        return SendResult.FULL
    except zmq.ZMQError as error:
        if error.errno == zmq.EHOSTUNREACH:
            return SendResult.GONE
        raise
    return SendResult.QUEUED


def receive_frames(socket: zmq.Socket[Any], limit: int = 1_000) -> Iterator[list[bytes]]:
    """Yield the multipart messages that have arrived, at most `limit`, without waiting.

    Drain a socket before you sleep on it: ZeroMQ's descriptors are edge-triggered.
    """
    for _ in range(limit):
        try:
            yield socket.recv_multipart(zmq.DONTWAIT)
        except zmq.Again:
            return


def receive(socket: zmq.Socket[Any], kind: Any, limit: int = 1_000) -> Iterator[Any]:
    """Yield the messages that have arrived on a DEALER from a trusted peer. A bad one raises ProtocolError."""
    for frames in receive_frames(socket, limit):
        yield decode(frames[-1], kind)


def receive_from(socket: zmq.Socket[Any], kind: Any, limit: int = 1_000) -> Iterator[tuple[bytes, Any]]:
    """Yield the (identity, message) pairs that have arrived on a ROUTER from trusted peers."""
    for frames in receive_frames(socket, limit):
        yield frames[0], decode(frames[-1], kind)
