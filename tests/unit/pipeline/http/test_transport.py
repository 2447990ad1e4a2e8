"""Answers, streams and errors of a handler, as they arrive on a socket."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator

import pytest

from ipc.errors import EngineUnavailable, Interrupted, InvalidRequest, QueueFull
from pipeline.http.transport import Call, EventStream, Reply
from tests.unit.pipeline.http.application import app_of, ask
from tests.unit.pipeline.http.fake_engine import FakeEngine
from tests.unit.pipeline.http.running_server import echo, run, serve


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
        (Interrupted("the scheduler has died; no engine continued it"), 503, b"retry-after: 1\r\n"),
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


def test_an_error_of_the_middleware_is_answered_in_json_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    app = app_of(FakeEngine())
    del app.state.service.stats.num_responses_2xx
    with pytest.raises(AttributeError, match="num_responses_2xx"):
        ask(app, "/tokenize", {"prompt": "x"})
    assert any("failed" in record.getMessage() and record.exc_info for record in caplog.records)
