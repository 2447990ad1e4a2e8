"""Sends a frame and open descriptors to another process over a Unix socket.

The socket is of type SOCK_SEQPACKET: the kernel keeps the borders of packets, so no part of a frame is lost.
The kernel passes at most 253 descriptors with one packet; more of them travel in packets that come before the frame.
The receiver gets its own numbers for the descriptors, in the order in which they were sent.
"""

from __future__ import annotations

import os
import socket
from array import array
from collections.abc import Sequence
from typing import Final

from ipc.errors import EngineUnavailable

MAX_PACKET_DESCRIPTORS: Final = 253  # the kernel's SCM_MAX_FD
MAX_FRAME_BYTES: Final = 128 << 10  # below the kernel's usual bound on a packet, 208 KiB with its overhead
_MORE: Final = b"\0"  # instead of a frame: more descriptors follow. No msgpack map begins with this byte.


def descriptor_channel() -> tuple[socket.socket, socket.socket]:
    """Both ends of a new channel. Child processes inherit neither, unless the caller passes one on."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send_with_descriptors(channel: socket.socket, frame: bytes, descriptors: Sequence[int]) -> None:
    """Send a frame and copies of these descriptors, which stay open here. Never blocks.

    The receiver may read them later, even if this process has ended. Raises OSError if the channel has no room for them
    or the user has too many descriptors on their way (`ulimit -n`).
    """
    assert 0 < len(frame) <= MAX_FRAME_BYTES, f"a frame of {len(frame)} bytes does not fit in a packet"
    rest = list(descriptors)
    while len(rest) > MAX_PACKET_DESCRIPTORS:
        _send(channel, _MORE, rest[:MAX_PACKET_DESCRIPTORS])
        del rest[:MAX_PACKET_DESCRIPTORS]
    _send(channel, frame, rest)


def receive_with_descriptors(channel: socket.socket) -> tuple[bytes, list[int]]:
    """Wait for a frame and the descriptors that came with it. They are the caller's; no child process inherits them.

    Raises EngineUnavailable if the sender has closed its end, or if this process cannot open that many descriptors.
    """
    received: list[int] = []
    while True:
        frame, descriptors, flags = _receive(channel)
        received += descriptors
        if flags & socket.MSG_CTRUNC:
            for descriptor in received:
                os.close(descriptor)
            raise EngineUnavailable(
                f"this process could open only {len(received)} of the descriptors that it was sent: raise the limit "
                "(ulimit -n)"
            )
        if not frame:
            raise EngineUnavailable("the launcher ended before it had sent everything")
        if frame != _MORE:
            return frame, received


# As socket.send_fds and socket.recv_fds, which drop the flags that they are given.


def _send(channel: socket.socket, packet: bytes, descriptors: Sequence[int]) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))] if descriptors else []
    channel.sendmsg([packet], rights, socket.MSG_DONTWAIT)


def _receive(channel: socket.socket) -> tuple[bytes, list[int], int]:
    """A packet, its descriptors, and the flags that the kernel sets."""
    descriptors = array("i")
    room = socket.CMSG_SPACE(MAX_PACKET_DESCRIPTORS * descriptors.itemsize)
    packet, ancillary, flags, _ = channel.recvmsg(MAX_FRAME_BYTES, room, socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in ancillary:
        assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS), f"control message {level}/{kind} is not ours"
        descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    return packet, list(descriptors), flags
