"""Answers of a batch without an engine: errors of requests, full queues, and an engine that goes."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from ipc.errors import EngineUnavailable, InvalidRequest, QueueFull
from pipeline.batch_file import answering as module
from pipeline.batch_file.answering import Answering, answer_all
from pipeline.batch_file.lines import Answer, RequestLine
from pipeline.http.errors import OPENAI
from pipeline.http.transport import Call, EventStream, Reply

URL = "/v1/completions"


def line(custom_id: str, url: str = URL, method: str = "POST") -> RequestLine:
    return RequestLine(custom_id=custom_id, url=url, method=method, body=msgspec.Raw(b'"%b"' % custom_id.encode()))


def answers(monkeypatch: pytest.MonkeyPatch, handler: Any, lines: list[RequestLine], concurrency: int = 4) -> Any:
    """The answers by custom_id, when `handler` stands for /v1/completions."""
    monkeypatch.setitem(module.HANDLERS, URL, (handler, OPENAI))
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 0.001)
    found: dict[str, Answer] = {}
    service: Any = None

    def settle(request: RequestLine, answer: Answer) -> None:
        assert request.custom_id not in found
        found[request.custom_id] = answer

    asyncio.run(answer_all(Answering(service), iter(lines), concurrency, settle))
    return {key: (answer.status_code, msgspec.json.decode(answer.body)) for key, answer in found.items()}


def test_an_error_of_a_request_is_its_answer_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def handler(call: Call) -> Reply | EventStream:
        match call.body:
            case b'"bad"':
                raise InvalidRequest("prompt is empty")
            case b'"stream"':
                return EventStream(None)  # type: ignore[arg-type]
        return Reply({"text": call.body.decode()})

    lines = [line("a"), line("bad"), line("stream"), line("c", "/v1/embeddings"), line("d", method="GET"), line("e")]
    found = answers(monkeypatch, handler, lines)
    assert {key: status for key, (status, _) in found.items()} == {
        "a": 200, "bad": 400, "stream": 400, "c": 400, "d": 400, "e": 200,
    }  # fmt: skip
    assert found["a"][1] == {"text": '"a"'}
    assert found["bad"][1]["error"]["message"] == "prompt is empty"
    assert "leave it out" in found["stream"][1]["error"]["message"]


def test_a_full_queue_delays_a_request_and_answers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[bytes] = []

    async def handler(call: Call) -> Reply:
        if refused.count(call.body) < 3:
            refused.append(call.body)
            raise QueueFull("the queue is full", 0.001)
        return Reply({})

    found = answers(monkeypatch, handler, [line(str(i)) for i in range(10)])
    assert len(found) == 10
    assert {status for status, _ in found.values()} == {200}
    assert len(refused) == 30


def test_no_more_requests_run_at_a_time_than_allowed_and_none_is_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    running, most, num_read = 0, 0, 0

    async def handler(call: Call) -> Reply:
        nonlocal running, most
        running += 1
        most = max(most, running)
        assert num_read <= int(call.body[1:-1]) + 3
        await asyncio.sleep(0)
        running -= 1
        return Reply({})

    def lines() -> Any:
        nonlocal num_read
        for num_read in range(1, 51):
            yield line(str(num_read))

    found = answers(monkeypatch, handler, lines(), concurrency=3)
    assert (len(found), most) == (50, 3)


def test_an_engine_that_is_gone_ends_the_batch_and_answers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def handler(call: Call) -> Reply:
        if call.body == b'"3"':
            raise EngineUnavailable("the engine is gone")
        return Reply({})

    with pytest.raises(EngineUnavailable, match="is gone"):
        answers(monkeypatch, handler, [line(str(i)) for i in range(10)], concurrency=1)
