from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from ipc.channels import (
    SendResult,
    bind_router,
    connect_dealer,
    receive,
    receive_frames,
    receive_from,
    send,
    send_frames_to,
    send_to,
    try_send_to,
)
from ipc.errors import ConfigError, EngineUnavailable, ProtocolError
from ipc.messages import CancelRequests, TokenizeDone

DEADLINE_S = 20.0

# argv: endpoint, identity, first key, number of messages, "close" or "stay"
SENDER = """
import sys, zmq
from ipc.channels import connect_dealer, send
from ipc.messages import TokenizeDone
endpoint, identity, first, count, end = sys.argv[1:]
context = zmq.Context()
dealer = connect_dealer(context, endpoint, identity=identity.encode())
for key in range(int(first), int(first) + int(count)):
    send(dealer, TokenizeDone(key=key))
if end == "close":
    context.destroy()
else:
    sys.stdin.read()
"""


@pytest.fixture
def endpoint(tmp_path) -> str:
    return f"ipc://{tmp_path}/socket"


@pytest.fixture
def spawn(endpoint) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    children = []

    def start(identity: str, first: int, count: int, end: str) -> subprocess.Popen[bytes]:
        arguments = [sys.executable, "-c", SENDER, endpoint, identity, str(first), str(count), end]
        children.append(subprocess.Popen(arguments, stdin=subprocess.PIPE))
        return children[-1]

    yield start
    for child in children:
        child.kill()
        child.communicate()


def collect(router: zmq.Socket[Any], count: int) -> list[tuple[bytes, int]]:
    """The next `count` (identity, key) pairs."""
    found: list[tuple[bytes, int]] = []
    deadline = time.monotonic() + DEADLINE_S
    while len(found) < count:
        assert time.monotonic() < deadline, f"{len(found)} of {count} messages arrived"
        router.poll(100)
        found += [(identity, message.key) for identity, message in receive_from(router, TokenizeDone)]
    return found


def test_messages_go_both_ways_under_an_identity(context, endpoint):
    dealer = connect_dealer(context, endpoint, identity=b"tokenizer.0")
    send(dealer, TokenizeDone(key=3))  # waits for the peer
    router = bind_router(context, endpoint)
    assert collect(router, 1) == [(b"tokenizer.0", 3)]
    assert send_to(router, b"tokenizer.0", CancelRequests(keys=[3]))
    assert dealer.poll(DEADLINE_S * 1000)
    assert list(receive(dealer, CancelRequests)) == [CancelRequests(keys=[3])]
    assert list(receive(dealer, CancelRequests)) == []


def test_messages_go_over_ipv6(context):
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    router = bind_router(context, "tcp://[::1]:*")
    dealer = connect_dealer(context, router.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode(), identity=b"client")
    send(dealer, TokenizeDone(key=3))
    assert collect(router, 1) == [(b"client", 3)]


def test_a_send_to_an_unknown_peer_says_so(context, endpoint):
    router = bind_router(context, endpoint)
    assert not send_to(router, b"nobody", TokenizeDone(key=1))
    assert not send_frames_to(router, b"nobody", b"one", b"two")


def test_receiving_stops_at_its_limit(context, endpoint):
    router, dealer = bind_router(context, endpoint), connect_dealer(context, endpoint)
    for key in range(5):
        send(dealer, TokenizeDone(key=key))
    found: list[list[bytes]] = []
    deadline = time.monotonic() + DEADLINE_S
    while len(found) < 2 and time.monotonic() < deadline:
        router.poll(100)
        batch = list(receive_frames(router, limit=2))
        assert len(batch) <= 2
        found += batch
    assert len(found) + len(collect(router, 5 - len(found))) == 5


def test_a_peer_that_reads_nothing_is_full_at_the_send_mark_and_loses_nothing_that_was_queued(context, endpoint):
    router = bind_router(context, endpoint, send_mark=100)
    dealer = connect_dealer(
        context, endpoint, identity=b"slow", prepare=lambda socket: socket.setsockopt(zmq.RCVHWM, 1)
    )
    send(dealer, TokenizeDone(key=0))
    assert collect(router, 1) == [(b"slow", 0)]
    large = bytes(64 << 10)  # so that the kernel's buffers hold few
    num_queued = 0
    while (result := try_send_to(router, b"slow", num_queued.to_bytes(4, "big") + large)) is SendResult.QUEUED:
        num_queued += 1
        assert num_queued < 1_000, "there is no mark"
    assert result is SendResult.FULL
    assert num_queued >= 100
    assert try_send_to(router, b"nobody", b"x") is SendResult.GONE
    for number in range(num_queued):
        assert dealer.poll(DEADLINE_S * 1000)
        assert dealer.recv()[:4] == number.to_bytes(4, "big")
    deadline = time.monotonic() + DEADLINE_S
    while not send_frames_to(router, b"slow", b"again"):
        assert time.monotonic() < deadline, "a peer that has read everything is still full"
        router.poll(1)
    assert dealer.poll(DEADLINE_S * 1000)
    assert dealer.recv() == b"again"


def test_at_the_receive_mark_a_peers_messages_stay_on_its_own_side(context, endpoint):
    router = bind_router(context, endpoint, receive_mark=4)
    dealer = connect_dealer(context, endpoint, prepare=lambda socket: socket.setsockopt(zmq.SNDHWM, 4))
    dealer.setsockopt(zmq.SNDTIMEO, 500)
    num_sent = 0
    with contextlib.suppress(zmq.Again):
        while num_sent < 2_000:
            dealer.send(bytes(64 << 10))
            num_sent += 1
    assert num_sent < 2_000, "it can send for ever, though nothing is read"
    for _ in range(num_sent):
        assert router.poll(DEADLINE_S * 1000)
        assert len(router.recv_multipart()[1]) == 64 << 10


def test_a_message_of_another_kind_is_a_protocol_error(context, endpoint):
    router, dealer = bind_router(context, endpoint), connect_dealer(context, endpoint)
    send(dealer, TokenizeDone(key=1))
    assert router.poll(DEADLINE_S * 1000)
    with pytest.raises(ProtocolError):
        list(receive_from(router, CancelRequests))


def test_an_orderly_close_loses_nothing(context, endpoint, spawn):
    router = bind_router(context, endpoint)
    child = spawn("sender", 0, 20_000, "close")
    assert child.wait(DEADLINE_S) == 0  # everything has left it before anything is read here
    assert collect(router, 20_000) == [(b"sender", key) for key in range(20_000)]


def test_a_restarted_worker_is_heard_while_messages_of_the_dead_one_are_unread(context, endpoint, spawn):
    router = bind_router(context, endpoint)
    monitor = router.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
    dead = spawn("worker", 0, 5, "stay")
    assert router.poll(DEADLINE_S * 1000)
    dead.kill()
    dead.wait()
    spawn("worker", 100, 5, "stay")
    events: list[int] = []  # nothing is read before the successor is connected
    while events.count(zmq.EVENT_HANDSHAKE_SUCCEEDED) < 2:
        assert monitor.poll(DEADLINE_S * 1000), "the successor does not connect"
        events.append(recv_monitor_message(monitor)["event"])
    router.disable_monitor()
    keys: set[int] = set()
    deadline = time.monotonic() + DEADLINE_S
    while not keys >= set(range(100, 105)):
        assert time.monotonic() < deadline, f"only {sorted(keys)} arrived"
        router.poll(100)
        keys |= {message.key for _, message in receive_from(router, TokenizeDone)}
    assert send_to(router, b"worker", TokenizeDone(key=1))


def test_a_worker_that_was_frozen_for_long_is_not_taken_for_dead(context, endpoint, spawn, monkeypatch):
    monkeypatch.setattr("ipc.channels._HEARTBEAT_MS", 20)
    monkeypatch.setattr("ipc.channels._HEARTBEAT_TIMEOUT_MS", 60)
    router = bind_router(context, endpoint)
    worker = spawn("worker", 0, 1, "stay")
    assert collect(router, 1) == [(b"worker", 0)]
    os.kill(worker.pid, signal.SIGSTOP)
    monitor = router.get_monitor_socket()
    assert not monitor.poll(500), "the connection was cut"  # many heartbeat time-outs; over TCP it would be
    os.kill(worker.pid, signal.SIGCONT)
    assert send_to(router, b"worker", TokenizeDone(key=1))
    router.disable_monitor()


def test_a_frame_beyond_the_routers_limit_never_arrives(context, endpoint):
    router = bind_router(context, endpoint, max_frame_bytes=1_000)
    large, small = connect_dealer(context, endpoint), connect_dealer(context, endpoint)
    send(large, CancelRequests(keys=[2**60] * 1_000))
    send(small, TokenizeDone(key=1))
    [(_, key)] = collect(router, 1)
    assert key == 1
    assert not list(receive_frames(router))


def test_an_endpoint_that_cannot_be_bound_is_named(context, tmp_path):
    missing = f"ipc://{tmp_path}/no/such/folder"
    with pytest.raises(EngineUnavailable, match=f"cannot listen on {missing}: "):
        bind_router(context, missing)


@pytest.mark.parametrize("endpoint", ["localhost:5555", "carrier-pigeon://roof", "tcp://host"])
def test_what_is_no_endpoint_is_named_with_the_cure(context, endpoint):
    with pytest.raises(ConfigError, match=f"cannot connect to '{endpoint}' .*: give ipc://PATH or tcp://HOST:PORT"):
        connect_dealer(context, endpoint)


def test_nobody_takes_over_the_identity_of_a_connected_client(context, endpoint):
    router = bind_router(context, endpoint, handover=False)
    first, second = (connect_dealer(context, endpoint, identity=b"me") for _ in range(2))
    send(first, TokenizeDone(key=1))
    assert collect(router, 1) == [(b"me", 1)]
    send(second, TokenizeDone(key=2))
    assert send_to(router, b"me", TokenizeDone(key=3))
    assert first.poll(5_000)
    assert not second.poll(100)
    assert not router.poll(100)
