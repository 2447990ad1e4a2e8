"""Responses that are kept: read again, continued, listed and deleted."""

from __future__ import annotations

import pytest

from tests.unit.pipeline.http.fake_engine import THINKING
from tests.unit.pipeline.http.openai.responses.responses_api import ResponsesApi
from tests.unit.pipeline.http.openai.responses.test_create import ADD, CALL


@pytest.fixture
def server() -> ResponsesApi:
    return ResponsesApi()


def test_a_response_is_read_as_it_was_answered_whether_streamed_or_not(server: ResponsesApi) -> None:
    for response in (server.create("a", metadata={"k": "v"}), server.stream("a")[-1]["response"]):
        assert server.ask("GET", f"responses/{response['id']}").json() == response


def test_any_process_continues_a_response(server: ResponsesApi) -> None:
    first = server.create("One", instructions="Count.", input="Begin")
    second = server.create("Two", previous_response_id=first["id"], input="Go on")
    other = ResponsesApi()
    other.engine.kept = server.engine.kept
    third = other.create("Three", previous_response_id=second["id"], input="And?", instructions="Be kind.")
    texts = [(message["role"], message["content"]) for message in other.messages]
    assert texts == [
        ("system", "Be kind."), ("user", "Begin"), ("assistant", "One"), ("user", "Go on"), ("assistant", "Two"),
        ("user", "And?"),
    ]  # fmt: skip
    assert third["previous_response_id"] == second["id"]


def test_a_call_is_answered_in_the_next_turn() -> None:
    server = ResponsesApi(THINKING)
    first = server.create("<think>Hm</think>", CALL, tools=[ADD])
    call_id = first["output"][-1]["call_id"]
    output = {"type": "function_call_output", "call_id": call_id, "output": [{"type": "input_text", "text": "2"}]}
    server.create("2", previous_response_id=first["id"], input=[output], tools=[ADD])
    assert [message["role"] for message in server.messages] == ["user", "assistant", "tool"]
    assert server.messages[-1]["content"] == "2"


def test_a_conversation_with_a_missing_turn_is_not_found(server: ResponsesApi) -> None:
    first = server.create("a")
    second = server.create("b", previous_response_id=first["id"])
    not_stored = server.create("c", store=False)
    assert server.ask("DELETE", f"responses/{first['id']}").json()["deleted"] is True
    for missing in (second["id"], not_stored["id"], "resp_" + "0" * 32, "x"):
        error = server.refused(404, previous_response_id=missing)
        assert (error["code"], error["param"]) == ("previous_response_not_found", "previous_response_id")


def test_references_stand_for_items_of_kept_responses(server: ResponsesApi) -> None:
    first = server.create("One", input="Begin")
    listed = server.ask("GET", f"responses/{first['id']}/input_items").json()["data"]
    ids = [listed[0]["id"], first["output"][0]["id"]]
    second = server.create("x", input=[{"type": "item_reference", "id": each} for each in ids])
    assert [message["content"] for message in server.messages] == ["Begin", "One"]
    server.engine.kept.pop(first["id"])
    server.create("y", previous_response_id=second["id"], input="More")
    assert [message["content"] for message in server.messages] == ["Begin", "One", "x", "More"]
    error = server.refused(404, input=[{"type": "item_reference", "id": ids[0]}])
    assert (error["code"], error["param"]) == ("item_not_found", "input[0].id")


def test_input_items_are_listed_in_pages_with_those_of_earlier_turns(server: ResponsesApi) -> None:
    first = server.create("One", input="Begin")
    second = server.create("Two", previous_response_id=first["id"], input="Go on")
    path = f"responses/{second['id']}/input_items"
    page = server.ask("GET", path, params={"limit": 2}).json()
    assert [item["content"][0]["text"] for item in page["data"]] == ["Go on", "One"]
    assert (page["has_more"], page["last_id"]) == (True, page["data"][1]["id"])
    rest = server.ask("GET", path, params={"limit": 2, "after": page["last_id"]}).json()
    assert [item["content"][0]["text"] for item in rest["data"]] == ["Begin"]
    assert rest["has_more"] is False
    assert server.ask("GET", path, params={"order": "asc"}).json()["first_id"] == rest["last_id"]
    for wrong in ({"limit": "0"}, {"limit": "x"}, {"order": "up"}, {"after": "nothing"}):
        assert server.ask("GET", path, params=wrong).status_code == 400


def test_a_deleted_response_is_not_found(server: ResponsesApi) -> None:
    response_id = server.create("a")["id"]
    assert server.ask("DELETE", f"responses/{response_id}").status_code == 200
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/input_items"), ("POST", "/cancel")):
        answer = server.ask(method, f"responses/{response_id}{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "response_not_found")


def test_only_a_response_in_the_background_can_be_cancelled(server: ResponsesApi) -> None:
    response_id = server.create("a")["id"]
    answer = server.ask("POST", f"responses/{response_id}/cancel")
    assert answer.status_code == 400
    assert "background" in answer.json()["error"]["message"]


def test_a_response_that_is_too_large_to_keep_says_so_and_is_answered(server: ResponsesApi) -> None:
    server.engine.max_kept_bytes = 10
    response = server.create("a")
    assert (response["status"], response["store"]) == ("completed", False)
    assert server.ask("GET", f"responses/{response['id']}").status_code == 404
