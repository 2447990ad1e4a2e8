"""Listening sockets without names."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from ipc.channels import bind_private_router, connect_dealer, receive_from, send
from ipc.errors import EngineUnavailable
from ipc.messages import Stop
from ipc.private_socket import endpoint_through, open_private_socket

DEADLINE_MS = 10_000
SPEAKER = """
import sys, zmq
from ipc.channels import connect_dealer, send
from ipc.messages import Stop
from ipc.private_socket import endpoint_through
context = zmq.Context()
send(connect_dealer(context, endpoint_through(int(sys.argv[1])), identity=b"child@1"), Stop())
context.destroy(linger=10_000)
"""


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    context: zmq.Context[Any] = zmq.Context()
    yield context
    context.destroy(linger=0)


def heard(router: zmq.Socket[Any]) -> list[tuple[bytes, Any]]:
    assert router.poll(DEADLINE_MS), "nothing has arrived"
    return list(receive_from(router, Stop))


def test_a_process_that_was_given_the_descriptor_connects_before_anybody_listens_and_nothing_is_left(
    tmp_path: Path, context: zmq.Context[Any]
) -> None:
    listener, connector = open_private_socket(tmp_path)
    try:
        assert not any(map(os.get_inheritable, (listener, connector)))
        assert list(tmp_path.iterdir()) == []
        early = connect_dealer(context, endpoint_through(connector), identity=b"early@1")
        send(early, Stop())
        child = [sys.executable, "-c", SPEAKER, str(connector)]
        with subprocess.Popen(child, pass_fds=(connector,)) as process:
            router = bind_private_router(context, listener)
            senders = set()
            while len(senders) < 2:
                senders |= {sender for sender, _ in heard(router)}
            assert process.wait(DEADLINE_MS / 1_000) == 0
        assert senders == {b"early@1", b"child@1"}
        assert list(tmp_path.iterdir()) == []
    finally:
        os.close(listener)
        os.close(connector)


def test_a_router_leaves_the_listener_to_its_owner(tmp_path: Path, context: zmq.Context[Any]) -> None:
    listener, connector = open_private_socket(tmp_path)
    try:
        former: zmq.Context[Any] = zmq.Context()
        bind_private_router(former, listener)
        former.destroy(linger=0)
        router = bind_private_router(context, listener)
        dealer = connect_dealer(context, endpoint_through(connector), identity=b"late@1")
        send(dealer, Stop())
        assert heard(router) == [(b"late@1", Stop())]
    finally:
        os.close(listener)
        os.close(connector)


def test_a_folder_without_room_for_a_socket_ends_with_its_name_and_the_cure(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    too_long = tmp_path / ("x" * 107)  # a Unix socket's path ends there
    too_long.mkdir()
    for folder in (tmp_path / "missing", too_long):
        with pytest.raises(EngineUnavailable, match="cannot open an internal socket in ") as found:
            open_private_socket(folder)
        (text,) = str(found.value).splitlines()
        assert str(folder) in text
        assert "set XDG_RUNTIME_DIR to a folder" in text
    assert set(os.listdir("/proc/self/fd")) == before
