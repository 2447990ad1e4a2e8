"""Frames and descriptors over a Unix socket."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from socket import socket

import pytest

from ipc.descriptor_passing import (
    MAX_FRAME_BYTES,
    MAX_PACKET_DESCRIPTORS,
    descriptor_channel,
    receive_with_descriptors,
    send_with_descriptors,
)
from ipc.errors import EngineUnavailable

Channel = tuple[socket, socket]


@pytest.fixture
def channel() -> Iterator[Channel]:
    ours, theirs = descriptor_channel()
    with ours, theirs:
        yield ours, theirs


@contextlib.contextmanager
def numbered_files(count: int) -> Iterator[list[int]]:
    """Descriptors of files whose sizes are 0, 1, 2, ..."""
    fds = [os.memfd_create(f"test-{size}") for size in range(count)]
    try:
        for size, fd in enumerate(fds):
            os.ftruncate(fd, size)
        yield fds
    finally:
        close_all(fds)


def close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("count", [0, 1, MAX_PACKET_DESCRIPTORS, MAX_PACKET_DESCRIPTORS + 1, 600])
def test_any_number_of_descriptors_arrives_in_order_and_is_not_inherited(channel: Channel, count: int) -> None:
    with numbered_files(count) as fds:
        send_with_descriptors(channel[0], b"a frame", fds)
        frame, received = receive_with_descriptors(channel[1])
        try:
            assert frame == b"a frame"
            assert [os.fstat(fd).st_size for fd in received] == list(range(count))
            assert not set(received) & set(fds)
            assert not any(map(os.get_inheritable, received))
        finally:
            close_all(received)


def test_messages_keep_their_borders_and_may_have_the_largest_size(channel: Channel) -> None:
    frames = [b"\x01" * MAX_FRAME_BYTES, b"\x02"]
    send_with_descriptors(channel[0], frames[0], [])
    assert receive_with_descriptors(channel[1]) == (frames[0], [])
    for frame in frames[::-1]:
        send_with_descriptors(channel[0], frame, [])
    assert [receive_with_descriptors(channel[1])[0] for _ in frames] == frames[::-1]


def test_a_message_can_be_read_after_its_sender_has_closed_everything(channel: Channel) -> None:
    ours, theirs = channel
    with numbered_files(3) as fds:
        send_with_descriptors(ours, b"a frame", fds)
    ours.close()
    _, received = receive_with_descriptors(theirs)
    assert [os.fstat(fd).st_size for fd in received] == [0, 1, 2]
    close_all(received)
    with pytest.raises(EngineUnavailable, match="the launcher ended before it had sent everything"):
        receive_with_descriptors(theirs)


def test_a_receiver_without_room_for_the_descriptors_says_so(channel: Channel) -> None:
    ours, theirs = channel
    with numbered_files(20) as fds:
        send_with_descriptors(ours, b"a frame", fds)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    next_fd = os.dup(0)
    os.close(next_fd)
    before = set(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_fd + 5, limit[1]))
    try:
        with pytest.raises(EngineUnavailable, match=r"only \d+ of the descriptors .* raise the limit \(ulimit -n\)"):
            receive_with_descriptors(theirs)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_sender_does_not_wait_for_a_receiver_that_reads_nothing(channel: Channel) -> None:
    def flood() -> None:
        for _ in range(100):
            send_with_descriptors(channel[0], b"\x01" * MAX_FRAME_BYTES, [])

    with pytest.raises(BlockingIOError):
        flood()


def test_a_worker_whose_launcher_has_ended_says_so_and_exits(channel: Channel) -> None:
    ours, theirs = channel
    ours.close()
    command = [sys.executable, "-m", "workers.detokenizer", "--bootstrap-fd", str(theirs.fileno())]
    done = subprocess.run(command, pass_fds=[theirs.fileno()], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "the launcher ended before it had sent everything" in done.stderr
    assert "Traceback" not in done.stderr
