"""The clients' socket at a TCP endpoint, in this process: keys, and raw connections that break the rules."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import msgspec
import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from ipc.channels import connect_dealer
from ipc.key_files import KeyPair, make_key_pair, read_secret_file, write_public_file, write_secret_file
from tests.unit.workers.gateway.gateway_tools import bootstrap
from workers.gateway import client_frames, client_keys, clients_socket, connection_limit
from workers.gateway.clients_socket import ClientsSocket

DEADLINE_S: Final = 20.0
GREETING: Final = b"\xff" + bytes(8) + b"\x7f\x03\0" + b"NULL".ljust(20, b"\0") + bytes(32)
READY: Final = b"\x05READY\x0bSocket-Type\0\0\0\x06DEALER"
HELLO: Final = GREETING + b"\x04" + bytes([len(READY)]) + READY
FAILED: Final = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)  # fmt: skip


class Engine:
    """Reads a ClientsSocket on a thread, as the gateway does, and echoes what clients send."""

    def __init__(self, folder: Path, keys: Path | None = None, **limits: Any) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        files = (
            {}
            if keys is None
            else {"server_key_file": f"{keys}/server.key_secret", "client_keys_folder": f"{keys}/allowed"}
        )
        made = bootstrap(
            endpoint=f"tcp://127.0.0.1:{self.port}",
            local_endpoint=f"ipc://{folder}/local.sock",
        )
        self.bootstrap = msgspec.structs.replace(
            made, frontend=msgspec.structs.replace(made.frontend, **files, **limits)
        )
        self.stats = SimpleNamespace(num_connections=[0], num_connections_refused=[0])
        self.context: zmq.Context[Any] = zmq.Context()
        self.messages: list[list[bytes]] = []
        self.num_turns = 0
        self._ends = threading.Event()
        process: Any = SimpleNamespace(context=self.context, stats=self.stats)
        self.clients = ClientsSocket(process, self.bootstrap)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        poller = zmq.Poller()
        for source in self.clients.sources:
            poller.register(source, zmq.POLLIN)
        while not self._ends.is_set():
            ready = dict(poller.poll(20))
            for frames in self.clients.read(ready):
                self.messages.append(frames)
                with contextlib.suppress(zmq.ZMQError):
                    self.clients.router.send_multipart([frames[0], *frames[1:]], zmq.DONTWAIT)
            self.num_turns += 1

    def close(self) -> None:
        self._ends.set()
        self._thread.join()
        self.context.destroy(0)

    def stranger(self, greeting: bytes = HELLO) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), DEADLINE_S)
        connection.sendall(greeting)
        if greeting == HELLO and self.bootstrap.frontend.server_key_file is None:
            received = b""
            while b"Identity\0\0\0\0" not in received:
                received += connection.recv(1_000)
        return connection


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    engines = []

    def start(**options: Any) -> Engine:
        engines.append(Engine(tmp_path, **options))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A folder with the keys of a server and of the clients "a" and "b"; only "a" is allowed."""
    server = make_key_pair()
    write_secret_file(tmp_path / "server.key_secret", server)
    (tmp_path / "allowed").mkdir()
    for name in "ab":
        client = make_key_pair(server.public)
        write_secret_file(tmp_path / f"{name}.key_secret", client)
        write_public_file(tmp_path / f"{name}.key", client.public)
    (tmp_path / "a.key").rename(tmp_path / "allowed" / "a.key")
    return tmp_path


def dealer(context: zmq.Context[Any], endpoint: str, keys: KeyPair | None = None) -> tuple[zmq.Socket[Any], Any]:
    monitors = []

    def prepare(made: zmq.Socket[Any]) -> None:
        made.setsockopt(zmq.LINGER, 0)
        monitors.append(made.get_monitor_socket())
        if keys is not None:
            made.curve_serverkey, made.curve_publickey, made.curve_secretkey = keys.server, keys.public, keys.secret

    return connect_dealer(context, endpoint, prepare=prepare), monitors[0]


def is_heard(client: zmq.Socket[Any], text: bytes = b"hi") -> bool:
    client.send(text)
    return bool(client.poll(DEADLINE_S * 1e3)) and client.recv() == text


def next_event(monitor: Any, *wanted: int) -> int:
    """The next event of these kinds."""
    while monitor.poll(DEADLINE_S * 1e3):
        event: int = recv_monitor_message(monitor)["event"]
        if event in wanted:
            return event
    raise AssertionError("no such event")


def eventually(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.002)


def is_closed(connection: socket.socket) -> bool:
    """Reads until the other side closes."""
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    return True


def test_only_allowed_keys_pass_the_handshake_and_this_users_socket_needs_none(
    start: Callable[..., Engine], keys: Path, context: zmq.Context[Any]
) -> None:
    engine = start(keys=keys)
    endpoint = engine.bootstrap.endpoint
    allowed, unknown = (read_secret_file(keys / f"{name}.key_secret") for name in "ab")
    strangers = {
        "unknown key": unknown,
        "no key": None,
        "key of another server": allowed._replace(server=unknown.public),
        "allowed key without its secret": allowed._replace(secret=unknown.secret),
    }
    clients = []  # kept: a monitor's name is taken until its socket is closed
    for what, pair in strangers.items():
        client, monitor = dealer(context, endpoint, pair)
        clients.append(client)
        client.send(b"stranger")
        assert next_event(monitor, zmq.EVENT_HANDSHAKE_SUCCEEDED, *FAILED) in FAILED, what
    with engine.stranger() as plain:
        assert is_closed(plain)
    good, _ = dealer(context, endpoint, allowed)
    assert is_heard(good)
    local, _ = dealer(context, engine.bootstrap.local_endpoint)
    assert is_heard(local)
    assert {frames[1] for frames in engine.messages} == {b"hi"}
    assert Path(engine.bootstrap.local_endpoint.removeprefix("ipc://")).stat().st_mode & 0o077 == 0


def test_the_folder_of_keys_is_read_again(
    start: Callable[..., Engine], keys: Path, context: zmq.Context[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_keys, "RELOAD_S", 0.0)
    engine = start(keys=keys)
    first, monitor = dealer(context, engine.bootstrap.endpoint, read_secret_file(keys / "a.key_secret"))
    assert is_heard(first)
    (keys / "b.key").rename(keys / "allowed" / "b.key")
    second, _ = dealer(context, engine.bootstrap.endpoint, read_secret_file(keys / "b.key_secret"))
    assert is_heard(second)
    (keys / "allowed" / "a.key").unlink()
    (keys / "allowed" / "broken.key").write_text("nothing")
    first.send(b"after its key was removed")
    next_event(monitor, zmq.EVENT_DISCONNECTED)
    next_event(monitor, zmq.EVENT_HANDSHAKE_FAILED_AUTH)
    assert is_heard(second)
    assert b"after its key was removed" not in {frames[1] for frames in engine.messages}


def test_an_unfinished_message_of_many_frames_ends_its_connection(
    start: Callable[..., Engine], context: zmq.Context[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_limit, "MAX_UNFINISHED_BYTES", 1 << 16)
    engine = start()
    good, _ = dealer(context, engine.bootstrap.endpoint)
    assert is_heard(good, bytes(1 << 18)), "a finished message may be larger"
    with engine.stranger() as connection:
        connection.sendall(b"\x01\0" * 40_000)
        assert is_closed(connection)
    with engine.stranger() as connection:
        connection.sendall(b"\x03" + struct.pack(">Q", 1 << 10) + bytes(1 << 10))  # a frame, and another one to come
        connection.sendall(b"\x02" + struct.pack(">Q", 50 << 20) + bytes(1 << 17))
        assert is_closed(connection)
    assert is_heard(good)
    eventually(lambda: engine.stats.num_connections_refused[0] == 2)
    assert len(engine.messages) == 2


def test_all_unfinished_messages_together_are_bounded(
    start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_limit, "MAX_ALL_UNFINISHED_BYTES", 1 << 18)
    engine = start()
    with contextlib.ExitStack() as stack:
        small = [stack.enter_context(engine.stranger()) for _ in range(3)]
        for connection in small:
            connection.sendall(b"\x01\0" * 20_000)
        large = stack.enter_context(engine.stranger())
        large.sendall(b"\x01\0" * 100_000)
        assert is_closed(large), "the largest one makes room"
        eventually(lambda: engine.stats.num_connections_refused[0] == 1 and engine.stats.num_connections[0] == 3)


def test_the_frames_of_a_long_message_are_dropped_in_bounded_turns_and_not_kept(
    start: Callable[..., Engine], context: zmq.Context[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients_socket, "_MAX_STEPS", 100)
    engine = start()
    with engine.stranger() as connection:
        turns = engine.num_turns
        connection.sendall(b"\x01\0" * 5_000 + b"\0\x01x")
        assert is_closed(connection)
    good, _ = dealer(context, engine.bootstrap.endpoint)
    assert is_heard(good)
    assert [len(frames) for frames in engine.messages] == [1 + client_frames.MAX_FRAMES, 2]
    assert engine.num_turns - turns >= 5_000 // 100


def test_connections_of_one_address_are_bounded_and_loopback_is_exempt(
    start: Callable[..., Engine], context: zmq.Context[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    exempt = connection_limit._is_loopback
    monkeypatch.setattr(connection_limit, "_is_loopback", lambda address: exempt(address) and address != "127.0.0.9")
    engine = start(max_connections_per_address=2)
    with contextlib.ExitStack() as stack:
        local = [stack.enter_context(engine.stranger()) for _ in range(4)]
        remote = []
        for _ in range(3):
            connection = stack.enter_context(socket.socket())
            connection.bind(("127.0.0.9", 0))
            connection.settimeout(DEADLINE_S)
            connection.connect(("127.0.0.1", engine.port))
            connection.sendall(HELLO)
            remote.append(connection)
        assert is_closed(remote[2])
        eventually(lambda: engine.stats.num_connections[0] == 6)
        remote[0].close()
        eventually(lambda: engine.stats.num_connections[0] == 5)
        again = stack.enter_context(socket.create_connection(("127.0.0.1", engine.port), DEADLINE_S, ("127.0.0.9", 0)))
        again.sendall(HELLO)
        eventually(lambda: engine.stats.num_connections[0] == 6)
        assert engine.stats.num_connections_refused[0] == 1
        assert len(local) == 4


@pytest.mark.parametrize("part", [b"", HELLO[:1], HELLO[:30], GREETING, HELLO[:-3]])
def test_a_handshake_that_stops_ends_its_connection(
    start: Callable[..., Engine], part: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_limit, "HANDSHAKE_TIMEOUT_MS", 50)
    with start().stranger(part) as connection:
        assert is_closed(connection)


def test_peers_of_old_protocols_do_no_harm(start: Callable[..., Engine], context: zmq.Context[Any]) -> None:
    """libzmq knows no connection of their messages."""
    engine = start()
    old = b"\xff" + bytes(8) + b"\x7f\x01\x05" + b"\0\0"  # ZMTP 2.0, DEALER, no identity
    with engine.stranger(old) as connection:
        connection.sendall(b"\0\x01x" + b"\x01\0" * 3 + b"\0\0")
        eventually(lambda: len(engine.messages) == 2)
        good, _ = dealer(context, engine.bootstrap.endpoint)
        assert is_heard(good)
        assert [frames[1:] for frames in engine.messages] == [[b"x"], [b"", b""], [b"hi"]]


def test_heartbeats_of_an_idle_client_are_no_unfinished_message() -> None:
    stats = SimpleNamespace(num_connections=[0], num_connections_refused=[0])
    keeper = connection_limit.Doorkeeper(("tcp://127.0.0.1:1",), bootstrap().frontend, stats)
    read, now = 1_000, 0.0
    keeper._taken[7] = read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection_limit, "_bytes_read", lambda _: read)
        patch.setattr(connection_limit.time, "monotonic", lambda: now)
        for _ in range(1_000):
            read, now = read + 30 * 60 * 41, now + 30 * 60  # of each half hour
            keeper._look()
    assert read > connection_limit.MAX_UNFINISHED_BYTES
    assert not keeper._suspects


def test_a_connection_is_refused_once_however_often_it_is_found_at_fault_before_it_has_ended() -> None:
    stats = SimpleNamespace(num_connections=[0], num_connections_refused=[0])
    keeper = connection_limit.Doorkeeper(("tcp://127.0.0.1:1",), bootstrap().frontend, stats)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as peer:
        accepted, _ = server.accept()
        with accepted, pytest.MonkeyPatch.context() as patch:
            patch.setattr(connection_limit, "_bytes_read", lambda _: connection_limit.MAX_UNFINISHED_BYTES + 1)
            fd, keeper._looked_at = accepted.fileno(), time.monotonic()
            for num_refused in (1, 2):  # the second connection gets the number of the first
                keeper._taken[fd] = 0
                for _ in range(3):
                    keeper._look()
                    keeper.close_suspects()
                assert stats.num_connections_refused == [num_refused]
                keeper._take_event(zmq.EVENT_DISCONNECTED, fd)
        assert is_closed(peer)
