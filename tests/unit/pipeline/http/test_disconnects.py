"""Clients that leave: their requests are cancelled and counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from pipeline.http.transport import Call, EventStream, Reply
from tests.unit.pipeline.http.running_server import DEADLINE_S, eventually, request, run, serve, until_cancelled


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
