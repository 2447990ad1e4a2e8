"""Answers of a batch without an engine: errors of requests, full queues, and an engine that goes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ipc.errors import EngineUnavailable, InvalidRequest, QueueFull
from pipeline.batch_file import answering as module
from pipeline.batch_file.answering import Answering, answer_all, service_of
from pipeline.batch_file.lines import Answer, RequestLine
from pipeline.client.outputs import Health
from pipeline.http.errors import OPENAI
from pipeline.http.transport import Call, EventStream, Reply

URL = "/v1/completions"


def line(custom_id: str, url: str = URL, method: str = "POST") -> RequestLine:
    return RequestLine(custom_id=custom_id, url=url, method=method, body=msgspec.Raw(b'"%b"' % custom_id.encode()))


def answers(monkeypatch: pytest.MonkeyPatch, handler: Any, lines: list[RequestLine], concurrency: int = 4) -> Any:
    """The answers by custom_id, when `handler` stands for /v1/completions."""
    monkeypatch.setitem(module.HANDLERS, URL, (handler, OPENAI))
    found: dict[str, Answer] = {}
    service: Any = None

    def settle(request: RequestLine, answer: Answer) -> None:
        assert request.custom_id not in found
        found[request.custom_id] = answer

    asyncio.run(answer_all(Answering(service), iter(lines), concurrency, settle))
    return {key: (answer.status_code, msgspec.json.decode(answer.body)) for key, answer in found.items()}


def test_names_and_parsers_are_those_of_the_engines_http_server(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")

    class Client:
        async def health(self) -> Health:
            return Health(
                state="ready", detail="", protocol_version=1, model="m", max_model_len=64, max_open_requests=4,
                model_folder=str(tmp_path), served_model_names=["alias", "m"], tool_parser="hermes",
                reasoning_parser="deepseek_r1",
            )  # fmt: skip

    client: Any = Client()
    service = asyncio.run(service_of(client))
    assert service.model_names == ("alias", "m")
    assert (service.format.tool_parser, service.format.reasoning_parser) == ("hermes", "deepseek_r1")


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


def test_a_full_queue_is_tried_by_one_request_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first refusals are of the requests under way; then one request tests the queue for all of them."""
    num_asked, num_asking, most_later = 0, 0, 0

    async def handler(call: Call) -> Reply:
        nonlocal num_asked, num_asking, most_later
        num_asked += 1
        num_asking += 1
        if 100 < num_asked <= 105:
            most_later = max(most_later, num_asking)
        await asyncio.sleep(0)
        num_asking -= 1
        if num_asked <= 105:
            raise QueueFull("the queue is full", 0.001)
        return Reply({})

    found = answers(monkeypatch, handler, [line(str(i)) for i in range(200)], concurrency=100)
    assert (len(found), most_later) == (200, 1)


def test_an_error_that_nobody_raises_on_purpose_is_the_answer_of_its_request_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(call: Call) -> Reply:
        if call.body == b'"odd"':
            raise ZeroDivisionError("a fault of ours")
        return Reply(object() if call.body == b'"mute"' else {})

    found = answers(monkeypatch, handler, [line("a"), line("odd"), line("mute"), line("z")])
    assert {key: status for key, (status, _) in found.items()} == {"a": 200, "odd": 500, "mute": 500, "z": 200}
    request_id = found["odd"][1]["error"]["message"].rpartition(" ")[2]
    assert request_id in caplog.text
    assert "a fault of ours" in caplog.text


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
