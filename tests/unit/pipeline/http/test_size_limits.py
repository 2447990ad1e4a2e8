"""Bounds on what clients may send: headers, bodies, connections and requests that wait."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from pipeline.http.server import MAX_HEADER_BYTES, MAX_PIPELINED
from pipeline.http.transport import MAX_ARRIVING_BODIES
from tests.unit.pipeline.http.running_server import DEADLINE_S, echo, eventually, request, run, serve


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
