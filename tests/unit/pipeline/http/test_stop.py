"""The end of a server: open requests finish, or get an error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from pipeline.http.transport import Call, EventStream, Reply
from tests.unit.pipeline.http.running_server import DEADLINE_S, eventually, request, run, serve


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


@pytest.mark.parametrize(
    ("streams", "sends_all"),
    [(False, True), (True, True), (False, False)],
    ids=["without an answer", "in a stream", "without its last byte"],
)
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
            await eventually(lambda: running.stats.num_stream_events[0] == int(streams))
            await running.stop()
            answer = await asyncio.wait_for(reader.read(), DEADLINE_S)
            writer.close()
            assert b'{"error":{"message":"this server ends before the request is done' in answer
            assert running.stats.num_responses_503[0] == int(not streams)
        if streams:
            assert answer.startswith(b"HTTP/1.1 200")
            assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        else:
            assert answer.startswith(b"HTTP/1.1 503")
            assert b"retry-after: 1\r\n" in answer

    run(test)
