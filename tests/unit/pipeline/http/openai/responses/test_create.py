"""Responses from a scripted engine: the engine's requests, and the answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.http.parsing.formats import OutputFormat
from tests.unit.pipeline.http.fake_engine import THINKING, logprob_of
from tests.unit.pipeline.http.openai.responses.responses_api import ResponsesApi

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
ADD = {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}


@pytest.fixture
def server() -> ResponsesApi:
    return ResponsesApi()


@pytest.fixture
def thinker() -> ResponsesApi:
    return ResponsesApi(THINKING)


def test_a_string_is_the_users_message_and_the_answer_is_one_message_item(server: ResponsesApi) -> None:
    response = server.create("Hel", "lo", instructions="Be brief.")
    assert server.messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    (item,) = response["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert item["content"] == [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}]
    assert (response["status"], response["error"], response["incomplete_details"]) == ("completed", None, None)
    assert response["usage"] == {
        "input_tokens": 11, "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0}, "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 16,
    }  # fmt: skip


def test_the_answer_repeats_the_request_and_names_the_values_that_were_left_out(server: ResponsesApi) -> None:
    given = {"metadata": {"a": "b"}, "max_output_tokens": 5, "user": "u", "truncation": "auto", "top_logprobs": 2}
    response = server.create("x", **given)
    assert given.items() <= response.items()
    assert (response["temperature"], response["top_p"], response["store"]) == (1.0, 1.0, True)
    assert response["text"]["format"] == {"type": "text"}
    assert (server.params.max_tokens, server.params.truncate_prompt_tokens) == (5, -1)


def test_reasoning_text_and_calls_of_an_answer_are_items_in_their_order(thinker: ResponsesApi) -> None:
    response = thinker.create("<think>", "Hm", "</think>", "So: ", CALL, tools=[ADD])
    reasoning, message, call = response["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm"}]
    assert message["content"][0]["text"].strip() == "So:"
    assert (call["type"], call["name"], json.loads(call["arguments"])) == ("function_call", "add", {"a": 1})
    assert len({item["id"] for item in response["output"]}) == 3
    assert response["usage"]["output_tokens_details"]["reasoning_tokens"] == 4
    assert response["tools"] == [{**ADD, "strict": False, "description": None}]


def test_reasoning_without_tokens_of_its_own_is_counted_by_its_share_of_the_text() -> None:
    server = ResponsesApi(OutputFormat(reasoning_parser="think", reasoning_tags=("<think>", "</think>")))
    usage = server.create("<think>", "ab", "cd", "</think>", "efgh", "ijkl")["usage"]
    assert usage["output_tokens_details"] == {"reasoning_tokens": 5}  # 4 of 12 characters, of 14 tokens


def test_a_tool_loop_sends_the_call_and_its_output_as_messages(thinker: ResponsesApi) -> None:
    first = thinker.create("<think>Hm</think>", CALL, tools=[ADD])
    call = first["output"][-1]
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "2"}
    thinker.create("2", input=[{"role": "user", "content": "1+1?"}, *first["output"], output], tools=[ADD])
    user, assistant, tool = thinker.messages
    assert assistant["reasoning_content"] == "Hm"
    assert assistant["tool_calls"][0]["function"] == {"name": "add", "arguments": call["arguments"]}
    assert tool == {"role": "tool", "tool_call_id": call["call_id"], "name": "add", "content": "2"}
    assert user["content"] == "1+1?"


def test_parts_of_messages_are_joined_and_developers_are_systems(server: ResponsesApi) -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    answer = [{"type": "output_text", "text": "c", "annotations": []}]
    server.create("x", instructions="I.", input=[
        {"type": "message", "role": "developer", "content": "D."}, {"role": "user", "content": parts},
        {"role": "assistant", "content": answer, "id": "msg_1", "status": "completed"},
        {"role": "system", "content": "S."},
    ])  # fmt: skip
    assert server.messages == [
        {"role": "system", "content": "I.\n\nD."}, {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c"}, {"role": "system", "content": "S."},
    ]  # fmt: skip


def test_an_answer_that_reached_its_limit_is_incomplete(server: ResponsesApi) -> None:
    response = server.create("Hel", finish_reason="length")
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][0]["status"] == "incomplete"


def test_an_answer_without_text_is_an_empty_message(server: ResponsesApi) -> None:
    (item,) = server.create("")["output"]
    assert item["content"][0]["text"] == ""


def test_a_schema_in_the_text_format_becomes_the_grammar(server: ResponsesApi) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    format = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    response = server.create("{}", text={"format": format, "verbosity": "low"})
    assert server.params.structured_outputs is not None
    assert json.loads(str(server.params.structured_outputs.json)) == schema
    assert format.items() <= response["text"]["format"].items()


def test_log_probabilities_belong_to_the_text_and_not_to_the_reasoning(thinker: ResponsesApi) -> None:
    texts = ("<think>", "Hm", "</think>", "a", "é")
    include = ["message.output_text.logprobs"]
    part = thinker.create(*texts, include=include, top_logprobs=2)["output"][-1]["content"][0]
    assert thinker.params.logprobs == 2
    rows = [(each["token"], each["logprob"], each["bytes"]) for each in part["logprobs"]]
    assert rows == [(text, logprob_of(byte), [byte]) for text, byte in (("a", 97), ("\ufffd", 195), ("\ufffd", 169))]
    assert [[each["token"] for each in row["top_logprobs"]] for row in part["logprobs"]] == [["A", "B"]] * 3
    deltas = [event for event in thinker.stream(*texts, include=include) if "output_text.delta" in event["type"]]
    assert [len(event["logprobs"]) for event in deltas] == [1, 2]


def test_vllms_fields_reach_the_engine(server: ResponsesApi) -> None:
    server.create("x", top_k=3, cache_salt="s", priority=2, seed=1, repetition_penalty=1.1)
    options = server.engine.options[-1]
    assert (server.params.top_k, server.params.seed, server.params.repetition_penalty) == (3, 1, 1.1)
    assert (options["cache_salt"], options["scheduling"].priority) == ("s", -2)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"background": True}, "background", "not supported"),
        ({"prompt": {"id": "p"}}, "prompt", "instructions"),
        ({"conversation": "c"}, "conversation", "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "runs no tools itself"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools", "tools[0].name"),
        ({"tool_choice": {"type": "file_search"}, "tools": [ADD]}, "tool_choice", "must be 'function'"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text", "text.format.schema"),
        ({"text": {"format": {"name": "n"}}}, "text", "text.format.type"),
        ({"max_tokens": 5}, "max_tokens", "max_output_tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens", "at least 1"),
        ({"n": 2}, "n", "several requests"),
        ({"temperature": 3}, "temperature", "[0, 2]"),
        ({"top_logprobs": 99}, "top_logprobs", "must lie in"),
        ({"truncation": "middle"}, "truncation", "'auto'"),
        ({"include": ["everything"]}, "include", "must be one of"),
        ({"instruction": "x"}, "instruction", "instructions"),
        ({"input": []}, "input", "empty"),
        ({"input": None}, "input", "expected"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type", "function_call_output"),
        ({"input": [{"role": "boss", "content": "x"}]}, "input[0].role", "developer"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type", "reads text"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments", "missing"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "o"}]}, "input", "function_call too"),
    ],
)  # fmt: skip
def test_a_request_that_cannot_be_honoured_is_refused_with_its_field(
    server: ResponsesApi, body: dict[str, Any], param: str, words: str
) -> None:
    error = server.refused(**body)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert words in error["message"]


def test_the_tokens_of_an_input_are_counted_without_an_answer(server: ResponsesApi) -> None:
    answer = server.ask("POST", "responses/input_tokens", json={"input": "Hi", "instructions": "Go"})
    assert answer.json() == {"object": "response.input_tokens", "input_tokens": 4}
    assert not server.engine.chats
