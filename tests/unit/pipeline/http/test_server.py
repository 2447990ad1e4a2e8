"""The server on a real socket: bounds on connections, and what happens to a client that misbehaves or leaves."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.middleware import Middleware
from starlette.routing import Route

from ipc.errors import EngineUnavailable, InvalidRequest, QueueFull
from pipeline.http.app import Application, Bookkeeping
from pipeline.http.config import COUNTERS, HttpConfig
from pipeline.http.errors import OPENAI
from pipeline.http.listener import open_listener
from pipeline.http.operation import Operation
from pipeline.http.server import MAX_HEADER_BYTES, MAX_PIPELINED, Server
from pipeline.http.service import Service
from pipeline.http.transport import MAX_ARRIVING_BODIES, Call, Endpoint, EventStream, Handler, Reply
from tests.unit.pipeline.http.application import app_of, ask
from tests.unit.pipeline.http.fake_engine import FakeEngine

DEADLINE_S = 10.0


@dataclass
class Running:
    """A server with one endpoint at /, and its counters."""

    port: int
    service: Service
    stats: Any
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 24)

    async def ask(self, body: bytes = b"{}", headers: bytes = b"") -> bytes:
        """Send a request on a new connection that is closed after it, and return everything that comes back."""
        reader, writer = await self.connect()
        with contextlib.closing(writer):
            writer.write(request(body, headers + b"connection: close\r\n"))
            return await asyncio.wait_for(reader.read(), DEADLINE_S)


def request(body: bytes = b"{}", headers: bytes = b"") -> bytes:
    return b"POST / HTTP/1.1\r\nhost: here\r\n%bcontent-length: %d\r\n\r\n%b" % (headers, len(body), body)


@contextlib.asynccontextmanager
async def serve(handler: Handler, **settings: Any) -> AsyncIterator[Running]:
    stats = SimpleNamespace(**{name: [0] for name in COUNTERS})
    config = HttpConfig(port=0, **settings)
    service: Any = Service(
        client=None, config=config, model_names=("m",), model_folder="", max_model_len=8, format=None,
        reasoning_start=None, template_reads_tools=False, defaults=None, stats=stats,
    )  # type: ignore[arg-type]  # fmt: skip
    app = Application(
        routes=[Route("/", Endpoint(handler, OPENAI, Operation(generates=True)), methods=["POST"])],
        middleware=[Middleware(Bookkeeping)],
    )
    app.state.service = service
    with open_listener(config) as listener:
        server = Server(app, config, stats)
        task = asyncio.create_task(server.run_on(listener))
        try:
            yield Running(listener.getsockname()[1], service, stats)
        finally:
            server.should_exit = True
            await asyncio.wait_for(task, DEADLINE_S)


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.005)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())  # type: ignore[arg-type]


async def echo(call: Call) -> Reply:
    return Reply({"size": len(call.body)})


def test_a_request_is_answered_and_its_id_comes_back() -> None:
    async def test() -> None:
        async with serve(echo) as running:
            answer = await running.ask(b"x" * 100_000, b"X-Request-Id: mine\r\n")
            assert answer.startswith(b"HTTP/1.1 200")
            assert b"x-request-id: mine\r\n" in answer
            assert answer.endswith(b'{"size":100000}')
            assert running.stats.num_responses_2xx[0] == 1
            assert running.stats.num_open_requests[0] == 0

    run(test)


@pytest.mark.parametrize(
    ("error", "status", "expected"),
    [
        (InvalidRequest("top_p (3) must lie in (0, 1]"), 400, b'"param":"top_p"'),
        (QueueFull("the queue is full", 2.2), 429, b"retry-after: 3\r\n"),
        (EngineUnavailable("the engine is draining"), 503, b"retry-after: 1\r\n"),
        (ZeroDivisionError("secret"), 500, b"internal error"),
    ],
)
@pytest.mark.parametrize("streams", [False, True])
def test_an_error_before_the_first_output_has_its_own_status(
    error: Exception, status: int, expected: bytes, streams: bool
) -> None:
    async def handler(call: Call) -> Reply | EventStream:
        async def events() -> AsyncGenerator[bytes]:
            raise error
            yield b""

        if streams:
            return EventStream(events())
        raise error

    async def test() -> None:
        async with serve(handler) as running:
            answer = await running.ask()
            assert answer.startswith(b"HTTP/1.1 %d" % status)
            assert expected in answer
            assert b"secret" not in answer

    run(test)


def test_an_error_after_the_first_output_is_an_event_of_the_stream() -> None:
    async def handler(call: Call) -> EventStream:
        async def events() -> AsyncGenerator[bytes]:
            yield b"data: 1\n\n"
            raise EngineUnavailable("the engine is gone")

        return EventStream(events())

    async def test() -> None:
        async with serve(handler) as running:
            answer = await running.ask()
            assert answer.startswith(b"HTTP/1.1 200")
            assert b"data: 1\n\n" in answer
            assert b'"message":"the engine is gone"' in answer
            assert b"data: [DONE]\n\n" in answer

    run(test)


def test_an_item_without_an_event_sends_nothing_and_the_items_are_closed_at_an_error() -> None:
    closed: list[bool] = []

    async def handler(call: Call) -> EventStream:
        async def items() -> AsyncGenerator[int]:
            try:
                for number in range(5):
                    yield number
            finally:
                closed.append(True)

        def write(number: int) -> bytes:
            if number == 4:
                raise EngineUnavailable("the engine is gone")
            return b"data: %d\n\n" % number if number % 2 else b""

        return EventStream(items(), write)

    async def test() -> None:
        async with serve(handler) as running:
            answer = await running.ask()
            assert re.findall(rb"data: (\d)\n", answer) == [b"1", b"3"]
            assert b'"message":"the engine is gone"' in answer
            assert running.stats.num_stream_events == [2]
            assert closed == [True]

    run(test)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("is_abrupt", [False, True])
def test_a_client_that_disconnects_cancels_its_request_within_50_ms(streams: bool, is_abrupt: bool) -> None:
    async def test() -> None:
        started, cancelled = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            started.set()
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        async def handler(call: Call) -> Reply | EventStream:
            async def events() -> AsyncGenerator[bytes]:
                yield b"data: 1\n\n"
                await work()

            if streams:
                return EventStream(events())
            await work()
            return Reply({})

        async with serve(handler) as running:
            _, writer = await running.connect()
            writer.write(request())
            await asyncio.wait_for(started.wait(), DEADLINE_S)
            if is_abrupt:
                writer.transport.abort()
            else:
                writer.close()
            await asyncio.wait_for(cancelled.wait(), DEADLINE_S)
            await eventually(lambda: running.stats.num_responses_499[0] == 1)
            assert running.stats.num_disconnects[0] == 1
            assert running.stats.num_open_requests[0] == running.stats.num_open_streams[0] == 0

    run(test)


def test_headers_without_end_are_refused_and_cost_no_more_memory_than_their_bound() -> None:
    async def test() -> None:
        async with serve(echo) as running:
            for flood in (b"POST / HTTP/1.1\r\nx: ", b"POST /", b"POST / HTTP/1.1\r\n" + b"a: b\r\n" * 400):
                reader, writer = await running.connect()
                writer.write(flood)
                with contextlib.suppress(ConnectionError):
                    for _ in range(200):
                        writer.write(b"x" * MAX_HEADER_BYTES)
                        await writer.drain()
                with contextlib.suppress(ConnectionError):
                    answer = await asyncio.wait_for(reader.read(), DEADLINE_S)
                    assert answer == b"" or answer.startswith(b"HTTP/1.1 431")
                writer.transport.abort()
            assert running.stats.num_headers_too_large[0] == 3
            assert (await running.ask()).startswith(b"HTTP/1.1 200")

    run(test)


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_above_the_limit_is_refused_with_413(is_chunked: bool) -> None:
    async def test() -> None:
        async with serve(echo, max_body_bytes=1_024) as running:
            reader, writer = await running.connect()
            if is_chunked:
                writer.write(b"POST / HTTP/1.1\r\nhost: here\r\ntransfer-encoding: chunked\r\n\r\n")
                writer.write(b"400\r\n" + b"x" * 1_024 + b"\r\n1\r\nx\r\n0\r\n\r\n")
            else:
                writer.write(request(b"x" * 1_025))
            answer = await asyncio.wait_for(reader.readuntil(b"}}"), DEADLINE_S)
            assert answer.startswith(b"HTTP/1.1 413")
            writer.write(request())
            assert b'{"size":2}' in await asyncio.wait_for(reader.readuntil(b"}"), DEADLINE_S), (
                "the connection lives on"
            )
            writer.close()

    run(test)


def test_a_client_that_sends_too_slowly_is_cut_off_and_a_steady_one_is_not() -> None:
    async def test() -> None:
        async with serve(echo, receive_timeout_s=0.15) as running:
            silent, begun, trickling = [await running.connect() for _ in range(3)]
            begun[1].write(b"POST / HTTP/1.1\r\nx: y\r\n")
            trickling[1].write(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\nx")
            for reader, writer in (silent, begun, trickling):
                assert await asyncio.wait_for(reader.read(), DEADLINE_S) == b""
                writer.close()
            assert running.stats.num_header_timeouts[0] == 3
            assert running.stats.num_open_requests[0] == 0
            reader, writer = await running.connect()
            writer.write(request(b"x" * 100_000)[:-50_000])
            for _ in range(10):  # longer than the time-out, at a good pace
                await asyncio.sleep(0.03)
                writer.write(b"x" * 5_000)
            assert b"200 OK" in await asyncio.wait_for(reader.readuntil(b"}"), DEADLINE_S)
            writer.close()

    run(test)


def test_connections_above_the_limit_are_closed_at_once_and_counted() -> None:
    async def test() -> None:
        async with serve(echo, max_connections=2) as running:
            held = [await running.connect() for _ in range(2)]
            await eventually(lambda: running.stats.num_connections[0] == 2)
            reader, writer = await running.connect()
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), DEADLINE_S) == b""
            writer.close()
            assert running.stats.num_connections_refused[0] == 1
            for _, held_writer in held:
                held_writer.close()
            await eventually(lambda: running.stats.num_connections[0] == 0)
            assert (await running.ask()).startswith(b"HTTP/1.1 200")

    run(test)


def test_bytes_that_are_not_http_are_refused() -> None:
    async def test() -> None:
        async with serve(echo) as running:
            for garbage in (
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
                b"GET\r\n\r\n",
                b"\r\n" * 50 + b"\0" * 100,
            ):
                reader, writer = await running.connect()
                writer.write(garbage)
                answer = await asyncio.wait_for(reader.read(), DEADLINE_S)
                assert answer == b"" or answer.startswith(b"HTTP/1.1 400")
                writer.close()
            assert (await running.ask()).startswith(b"HTTP/1.1 200")

    run(test)


def test_a_drain_waits_for_the_last_open_request() -> None:
    async def test() -> None:
        release = asyncio.Event()

        async def handler(call: Call) -> Reply:
            await release.wait()
            return Reply({})

        async with serve(handler) as running:
            asked = asyncio.create_task(running.ask())
            await eventually(lambda: running.stats.num_open_requests[0] == 1)
            drained = asyncio.create_task(running.service.wait_idle())
            await asyncio.sleep(0)
            assert not drained.done()
            release.set()
            await asyncio.wait_for(drained, DEADLINE_S)
            assert (await asked).startswith(b"HTTP/1.1 200")

    run(test)


async def until_cancelled(cancelled: asyncio.Event) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        cancelled.set()


@pytest.mark.parametrize("is_abrupt", [False, True])
def test_a_client_that_leaves_cancels_its_request_even_if_further_requests_wait_behind_it(is_abrupt: bool) -> None:
    async def test() -> None:
        cancelled = asyncio.Event()

        async def handler(call: Call) -> Reply:
            await until_cancelled(cancelled)
            return Reply({})

        async with serve(handler) as running:
            _, writer = await running.connect()
            writer.write(request() * 3)
            await eventually(lambda: running.stats.num_requests[0] == 3)
            assert running.stats.num_open_requests[0] == 1
            if is_abrupt:
                writer.transport.abort()
            else:
                writer.close()
            await asyncio.wait_for(cancelled.wait(), DEADLINE_S)
            await eventually(lambda: running.stats.num_open_requests[0] == 0)
            assert running.stats.num_disconnects[0] == 1

    run(test)


def test_a_client_that_ends_its_sending_side_has_left() -> None:
    async def test() -> None:
        cancelled = asyncio.Event()

        async def handler(call: Call) -> Reply:
            await until_cancelled(cancelled)
            return Reply({})

        async with serve(handler) as running:
            reader, writer = await running.connect()
            writer.write(request())
            await eventually(lambda: running.stats.num_open_requests[0] == 1)
            writer.write_eof()
            await asyncio.wait_for(cancelled.wait(), DEADLINE_S)
            assert await asyncio.wait_for(reader.read(), DEADLINE_S) == b""
            writer.close()

    run(test)


def test_pipelined_requests_are_answered_in_order_and_too_many_close_the_connection() -> None:
    async def test() -> None:
        async with serve(echo, receive_timeout_s=0.2) as running:
            reader, writer = await running.connect()
            sizes = [1, 100_000, 3, 200_000, 5]
            writer.write(b"".join(request(b"x" * size) for size in sizes))
            for size in sizes:
                answer = await asyncio.wait_for(reader.readuntil(b"}"), DEADLINE_S)
                assert answer.endswith(b'{"size":%d}' % size)
            writer.write(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n" * 5_000)
            with contextlib.suppress(ConnectionError):
                assert (await asyncio.wait_for(reader.read(), DEADLINE_S)).count(b"HTTP/1.1") < 5_000
            writer.close()
            await eventually(lambda: running.stats.num_connections[0] == 0)
            assert running.stats.num_requests[0] < 2 * MAX_PIPELINED

    run(test)


def test_a_body_that_waits_behind_a_long_request_is_not_taken_for_a_slow_client() -> None:
    async def test() -> None:
        release = asyncio.Event()

        async def handler(call: Call) -> Reply:
            await release.wait()
            return await echo(call)

        async with serve(handler, receive_timeout_s=0.05) as running:
            reader, writer = await running.connect()
            writer.write(request(b"first") + request(b"x" * 3_000_000))
            await eventually(lambda: running.stats.num_requests[0] == 2)
            await asyncio.sleep(0.15)  # three times the limit
            release.set()
            await asyncio.wait_for(reader.readuntil(b'{"size":5}'), DEADLINE_S)
            await asyncio.wait_for(reader.readuntil(b'{"size":3000000}'), DEADLINE_S)
            writer.close()

    run(test)


@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_reads_nothing_is_cut_off_and_its_request_cancelled(streams: bool) -> None:
    async def test() -> None:
        async def handler(call: Call) -> Reply | EventStream:
            async def events() -> AsyncIterator[bytes]:
                while True:
                    yield b"data: " + b"x" * 10_000 + b"\n\n"

            return EventStream(events()) if streams else Reply(b"x" * 20_000_000)

        async with serve(handler, receive_timeout_s=0.1) as running:
            _, writer = await running.connect()
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(request())
            await eventually(lambda: running.stats.num_send_timeouts[0] == 1)
            await eventually(lambda: running.stats.num_connections[0] == 0)
            await eventually(lambda: running.stats.num_open_requests[0] == running.stats.num_open_streams[0] == 0)
            writer.close()

    run(test)


def test_a_client_that_reads_slowly_gets_its_whole_answer() -> None:
    async def test() -> None:
        async def handler(call: Call) -> Reply:
            return Reply(b"x" * 20_000_000)

        async with serve(handler, receive_timeout_s=0.1) as running:
            reader, writer = await asyncio.open_connection("127.0.0.1", running.port)  # buffers little
            writer.write(request(headers=b"connection: close\r\n"))
            size = 0
            while chunk := await asyncio.wait_for(reader.read(100_000), DEADLINE_S):
                size += len(chunk)
                await asyncio.sleep(0.001)
            assert size > 20_000_000
            assert running.stats.num_send_timeouts[0] == 0
            writer.close()

    run(test)


@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_request_to_change_the_protocol_is_ignored(is_chunked: bool, is_split: bool) -> None:
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"
    chunked = b"POST / HTTP/1.1\r\n%btransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n" % upgrade
    one = chunked if is_chunked else request(b"abcdefg", upgrade)

    async def test() -> None:
        async with serve(echo) as running:
            reader, writer = await running.connect()
            sent = one + one + request(b"x") + one
            for i in range(0, len(sent), 7 if is_split else len(sent)):
                writer.write(sent[i : i + (7 if is_split else len(sent))])
                await asyncio.sleep(0)
            for size in (7, 7, 1, 7):
                answer = await asyncio.wait_for(reader.readuntil(b"}"), DEADLINE_S)
                assert answer.startswith(b"HTTP/1.1 200")
                assert answer.endswith(b'{"size":%d}' % size)
            writer.close()


@pytest.mark.parametrize("sends_all", [True, False])
@pytest.mark.parametrize("streams", [False, True])
def test_a_request_that_is_open_when_the_server_ends_gets_an_error(
    streams: bool, sends_all: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.http.server._STOP_TIMEOUT_S", 0)

    async def handler(call: Call) -> Reply | EventStream:
        async def events() -> AsyncIterator[bytes]:
            yield b"data: 1\n\n"
            await asyncio.Event().wait()

        if streams:
            return EventStream(events())
        await asyncio.Event().wait()
        return Reply({})

    async def test() -> None:
        async with serve(handler) as running:
            reader, writer = await running.connect()
            writer.write(request() if sends_all else request()[:-1])
            await eventually(lambda: running.stats.num_requests[0] == 1)
            if sends_all:
                await eventually(lambda: running.stats.num_stream_events[0] == int(streams))
        answer = await asyncio.wait_for(reader.read(), DEADLINE_S)
        writer.close()
        assert answer.startswith(b"HTTP/1.1 200" if streams and sends_all else b"HTTP/1.1 503")
        assert b'{"error":{"message":"this server ends before the request is done' in answer
        if streams and sends_all:
            assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")

    run(test)


@pytest.mark.parametrize("is_complete", [False, True])
def test_a_server_that_stops_answers_open_requests_with_503(is_complete: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.http.server._STOP_TIMEOUT_S", 0.05)

    async def test() -> None:
        async with serve(until_cancelled_reply) as running:
            reader, writer = await running.connect()
            writer.write(request() if is_complete else request()[:-1])
            await eventually(lambda: running.stats.num_requests[0] == 1)
        answer = await asyncio.wait_for(reader.read(), DEADLINE_S)
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"retry-after: 1\r\n" in answer
        assert running.stats.num_responses_503[0] == 1
        writer.close()

    run(test)


async def until_cancelled_reply(call: Call) -> Reply:
    await asyncio.Event().wait()
    return Reply({})


def test_bodies_that_arrive_together_take_a_bounded_part_of_memory() -> None:
    async def test() -> None:
        async with serve(echo, max_body_bytes=100_000) as running:
            whole = request(b"x" * 100_000)
            writers = []
            for _ in range(MAX_ARRIVING_BODIES):
                _, writer = await running.connect()
                writer.write(whole[:-1])
                writers.append(writer)
            await eventually(lambda: running.service.num_arriving_bytes == MAX_ARRIVING_BODIES * 99_999)
            assert (await running.ask(b"small")).startswith(b"HTTP/1.1 200"), "a body that is complete needs no place"
            reader, writer = await running.connect()
            writer.write(whole[:-1])
            answer = await asyncio.wait_for(reader.readuntil(b"}}"), DEADLINE_S)
            assert answer.startswith(b"HTTP/1.1 503")
            for each in (*writers, writer):
                each.close()
            await eventually(lambda: running.service.num_arriving_bytes == 0)

    run(test)


def test_an_error_of_the_middleware_is_answered_in_json_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    app = app_of(FakeEngine())
    del app.state.service.stats.num_responses_2xx
    with pytest.raises(AttributeError, match="num_responses_2xx"):
        ask(app, "/tokenize", {"prompt": "x"})
    assert any("failed" in record.getMessage() and record.exc_info for record in caplog.records)


def test_a_stream_that_has_ended_is_no_disconnect() -> None:
    async def handler(call: Call) -> Reply | EventStream:
        async def events() -> AsyncGenerator[bytes]:
            yield b"data: 1\n\n"

        return EventStream(events())

    async def test() -> None:
        async with serve(handler) as running:
            assert (await running.ask()).endswith(b"0\r\n\r\n")
            await eventually(lambda: running.stats.num_open_requests[0] == 0)
            assert running.stats.num_disconnects[0] == running.stats.num_responses_499[0] == 0
            assert running.stats.num_responses_2xx[0] == 1

    run(test)
