"""The events of streamed responses: their order, their places, and that they add up to the response."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ipc.errors import EngineUnavailable, QueueFull
from tests.unit.pipeline.http.fake_engine import THINKING
from tests.unit.pipeline.http.openai.responses.responses_api import ResponsesApi
from tests.unit.pipeline.http.openai.responses.test_create import ADD, CALL


def names(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def test_each_token_of_a_message_is_one_event_between_those_of_its_item() -> None:
    events = ResponsesApi().stream("Hel", "lo", "!")
    assert names(events) == [
        "created", "in_progress", "output_item.added", "content_part.added", *["output_text.delta"] * 3,
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert [event["delta"] for event in events[4:7]] == ["Hel", "lo", "!"]
    assert events[0]["response"]["status"] == "in_progress"
    assert events[2]["item"]["content"] == []
    assert {(e["item_id"], e["output_index"], e["content_index"]) for e in events[3:9]} == {
        (events[2]["item"]["id"], 0, 0)
    }
    assert events[7]["text"] == events[8]["part"]["text"] == "Hello!"
    assert events[-1]["response"]["output"] == [events[9]["item"]]


def test_reasoning_text_and_calls_are_streamed_as_items_of_their_own() -> None:
    call = [CALL[i : i + 8] for i in range(0, len(CALL), 8)]
    events = ResponsesApi(THINKING).stream("<think>", "H", "m", "</think>", "So", *call, tools=[ADD])
    added = [event["item"]["type"] for event in events if event["type"] == "response.output_item.added"]
    assert added == ["reasoning", "message", "function_call"]
    assert [e["delta"] for e in events if "reasoning_text.delta" in e["type"]] == ["H", "m"]
    arguments = [e["delta"] for e in events if "arguments.delta" in e["type"]]
    assert len(arguments) > 1
    assert json.loads("".join(arguments)) == {"a": 1}
    (done,) = (e for e in events if "arguments.done" in e["type"])
    assert (done["name"], done["arguments"], done["output_index"]) == ("add", "".join(arguments), 2)
    assert events[-1]["response"]["usage"]["output_tokens_details"]["reasoning_tokens"] > 0


@pytest.mark.parametrize("texts", [("Hi", "", " you"), ("",), ("<think>", "Hm", "</think>", "So", CALL)])
def test_a_streamed_response_equals_the_whole_one(texts: tuple[str, ...]) -> None:
    def comparable(response: dict[str, Any]) -> str:
        hidden = response["id"].removeprefix("resp_")
        items = [{**item, "call_id": ""} for item in response["output"]]
        return json.dumps([items, response["status"], response["usage"]]).replace(hidden, "")

    streamed = ResponsesApi(THINKING).stream(*texts, tools=[ADD])[-1]["response"]
    assert comparable(streamed) == comparable(ResponsesApi(THINKING).create(*texts, tools=[ADD]))


def test_a_stream_that_reaches_its_limit_ends_incomplete() -> None:
    events = ResponsesApi().stream("Hel", finish_reason="length")
    assert names(events)[-2:] == ["output_item.done", "incomplete"]
    assert events[-2]["item"]["status"] == events[-1]["response"]["status"] == "incomplete"


def test_an_error_before_the_first_token_has_its_own_status() -> None:
    server = ResponsesApi()
    server.engine.script(QueueFull("the queue is full", retry_after_s=2.0))
    answer = server.ask("POST", "responses", json={"input": "Hi", "stream": True})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")


def test_an_error_behind_the_first_token_fails_the_response() -> None:
    server = ResponsesApi()
    events = server.stream("Hel", EngineUnavailable("the engine has ended"))
    assert names(events)[-2:] == ["failed", "error"]
    response, error = events[-2]["response"], events[-1]
    assert (response["status"], response["output"][0]["content"][0]["text"]) == ("failed", "Hel")
    assert response["error"] == {"code": "server_error", "message": "the engine has ended"}
    assert (error["message"], error["error"]["code"]) == ("the engine has ended", "unavailable")
    assert not server.engine.kept
