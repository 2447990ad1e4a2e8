"""More silent connections than there are descriptors: the clients' socket keeps working."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from ipc.channels import connect_dealer
from pipeline.environment.module_search import module_environment

DEADLINE_S = 20.0
LIMITS = {"ipc": 1_024, "tcp": 256}  # descriptors; clients may take half of them. The kernel lets tcp in less quickly

# argv: endpoint, descriptors, max_connections, handshake time-out in ms. Answers every message with its counters.
GATEKEEPER = """
import json, resource, sys, types
import zmq
from ipc.channels import bind_router, receive_frames, send_frames_to
from workers.gateway import connection_limit as connections
from workers.gateway.config import FrontendConfig
endpoint, limit, most, connections.HANDSHAKE_TIMEOUT_MS = sys.argv[1], *map(int, sys.argv[2:])
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
stats = types.SimpleNamespace(num_connections=[0], num_connections_refused=[0])
limits = FrontendConfig(max_connections=most)
context = zmq.Context()
clients = bind_router(context, endpoint, prepare=connections.Doorkeeper((endpoint,), limits, stats).attach)
print(flush=True)
while clients.poll():
    for frames in receive_frames(clients):
        if frames[1] == b"end":
            context.destroy()
            sys.exit()
        counters = {name: value[0] for name, value in vars(stats).items()}
        send_frames_to(clients, frames[0], json.dumps(counters).encode())
"""

Gatekeeper = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture(params=["ipc", "tcp"])
def endpoint(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "ipc":
        return f"ipc://{tmp_path}/socket"
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"tcp://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def gatekeeper(endpoint: str) -> Iterator[Gatekeeper]:
    with contextlib.ExitStack() as stack:

        def start(max_connections: int = 4_096, handshake_ms: int = 60_000) -> Any:
            arguments = [endpoint, str(LIMITS[endpoint[:3]]), str(max_connections), str(handshake_ms)]
            process = subprocess.Popen(
                [sys.executable, "-c", GATEKEEPER, *arguments], env=module_environment(), stdout=subprocess.PIPE
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline() == b"\n"
            stack.callback(process.stdout.close)
            return process

        yield start


@pytest.fixture
def silent(endpoint: str) -> Iterator[Callable[[int], None]]:
    """Connects the given number of times, and keeps the connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with contextlib.ExitStack() as stack:

        def connect(count: int) -> None:
            for _ in range(count):
                if endpoint.startswith("ipc"):
                    connection = stack.enter_context(socket.socket(socket.AF_UNIX))
                    connection.settimeout(DEADLINE_S)
                    eventually(lambda connection=connection: connects(connection, endpoint.removeprefix("ipc://")))
                else:
                    host, _, port = endpoint.removeprefix("tcp://").partition(":")
                    stack.enter_context(socket.create_connection((host, int(port)), DEADLINE_S))

        yield connect
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def connects(connection: socket.socket, path: str) -> bool:
    """False while the queue of connections is full."""
    try:
        connection.connect(path)
    except BlockingIOError:
        return False
    return True


def ask(dealer: zmq.Socket[Any]) -> dict[str, int]:
    """Asks again if the connection was refused: a message may be lost with it."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        dealer.send(b"?")
        if dealer.poll(1_000):
            answer: dict[str, int] = json.loads(dealer.recv())
            return answer
        assert time.monotonic() < deadline, "no answer"


def eventually(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while not (result := condition()):
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.001)
    return result


def test_more_connections_than_descriptors_do_not_disturb_those_that_stand(
    gatekeeper: Gatekeeper, endpoint: str, context: zmq.Context[Any], silent: Callable[[int], None]
) -> None:
    process = gatekeeper()
    client = connect_dealer(context, endpoint)
    eventually(lambda: ask(client) == {"num_connections": 1, "num_connections_refused": 0})
    limit = LIMITS[endpoint[:3]]
    silent(limit * 7 // 8)
    eventually(lambda: ask(client)["num_connections"] <= limit // 2)
    eventually(lambda: ask(client)["num_connections_refused"] >= limit * 3 // 8)
    assert process.poll() is None
    client.send(b"end")
    assert process.wait(DEADLINE_S) == 0, "the socket closes while connections hang on it"


def test_connections_that_never_finish_their_handshake_make_room_for_a_client(
    gatekeeper: Gatekeeper, endpoint: str, context: zmq.Context[Any], silent: Callable[[int], None]
) -> None:
    gatekeeper(handshake_ms=300)
    silent(LIMITS[endpoint[:3]] * 7 // 8)
    client = connect_dealer(context, endpoint)
    ask(client)
    eventually(lambda: ask(client)["num_connections"] == 1)


def test_one_connection_more_than_the_configured_number_is_closed(
    gatekeeper: Gatekeeper, endpoint: str, context: zmq.Context[Any]
) -> None:
    gatekeeper(max_connections=2)
    first, second = (connect_dealer(context, endpoint) for _ in range(2))
    ask(first)
    ask(second)
    third = connect_dealer(context, endpoint)
    assert eventually(lambda: ask(first)["num_connections_refused"]) >= 1
    second.close(0)
    ask(third)
    eventually(lambda: ask(first)["num_connections"] == 2)
