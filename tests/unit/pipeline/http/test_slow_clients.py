"""Clients that send or read slowly: those that stand still are cut off, and steady ones are not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from pipeline.http.transport import Call, EventStream, Reply
from tests.unit.pipeline.http.running_server import DEADLINE_S, echo, eventually, request, run, serve


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
