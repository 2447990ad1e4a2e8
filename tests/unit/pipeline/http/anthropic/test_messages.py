"""`/v1/messages` and `/v1/messages/count_tokens` in front of an engine whose answers the test writes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ipc.errors import EngineUnavailable, InvalidRequest, QueueFull
from pipeline.http.anthropic.answer import INVALID_JSON
from tests.unit.pipeline.http.application import app_of, ask
from tests.unit.pipeline.http.fake_engine import THINKING, FakeEngine, ids_of

PATH = "/v1/messages"
WEATHER = {
    "name": "get_weather",
    "description": "Of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
ANSWER = ["<think>Hm", "m</think>", "Look: ", '<tool_call>\n{"name": "get_weather",']
ANSWER += [' "arguments": {"city": "Rio"}}\n', "</tool_call>"]
NUM_TOKENS = len(ids_of("".join(ANSWER)))


def body(**more: Any) -> dict[str, Any]:
    return {"model": "m", "max_tokens": 16, "messages": [{"role": "user", "content": "Hello"}], **more}


def events_of(text: str) -> list[tuple[str, Any]]:
    """(event, data) of each event of a stream."""
    found = []
    for event in text.strip().split("\n\n"):
        name, data = event.split("\n")
        value = json.loads(data.removeprefix("data: "))
        assert name == f"event: {value['type']}"
        found.append((value.pop("type"), value))
    return found


def test_a_whole_answer_has_thinking_text_calls_and_its_usage() -> None:
    answer = ask(app_of(FakeEngine(ANSWER), THINKING), PATH, body(tools=[WEATHER])).json()
    thinking, text, call = answer["content"]
    assert (thinking["type"], thinking["thinking"]) == ("thinking", "Hmm")
    assert thinking["signature"]
    assert text == {"type": "text", "text": "Look: "}
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "get_weather", {"city": "Rio"})
    assert call["id"].startswith("toolu_")
    assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", "m")
    assert answer["id"].startswith("msg_")
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("tool_use", None)
    usage = answer["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"], usage["output_tokens"]) == (3, 2, NUM_TOKENS)


def test_a_stream_has_the_same_blocks_one_after_the_other() -> None:
    answer = ask(app_of(FakeEngine(ANSWER), THINKING), PATH, body(tools=[WEATHER], stream=True))
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    events = events_of(answer.text)
    assert [name for name, _ in events[:2]] == ["message_start", "ping"]
    message = events[0][1]["message"]
    assert (message["content"], message["stop_reason"]) == ([], None)
    assert (message["usage"]["input_tokens"], message["usage"]["cache_read_input_tokens"]) == (3, 2)
    blocks: list[dict[str, Any]] = []
    texts: list[str] = []
    for name, value in events[2:-2]:
        if name == "content_block_start":
            assert value["index"] == len(blocks)
            blocks.append(value["content_block"])
            texts.append("")
        elif name == "content_block_delta":
            assert value["index"] == len(blocks) - 1
            delta = value["delta"]
            texts[-1] += {"signature_delta": lambda d: "", "text_delta": lambda d: d["text"]}.get(
                delta["type"], lambda d: d.get("thinking", d.get("partial_json"))
            )(delta)
        else:
            assert (name, value) == ("content_block_stop", {"index": len(blocks) - 1})
    assert [block["type"] for block in blocks] == ["thinking", "text", "tool_use"]
    assert texts[:2] == ["Hmm", "Look: "]
    assert (blocks[2]["name"], blocks[2]["input"], json.loads(texts[2])) == ("get_weather", {}, {"city": "Rio"})
    (last, end), (stop, _) = events[-2:]
    assert (last, stop) == ("message_delta", "message_stop")
    assert end["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert (end["usage"]["input_tokens"], end["usage"]["output_tokens"]) == (3, NUM_TOKENS)


def test_thinking_that_the_request_omits_is_a_block_without_text() -> None:
    thinking = {"type": "enabled", "budget_tokens": 50, "display": "omitted"}
    engine = FakeEngine(["<think>Hm</think>", "Hi"])
    app = app_of(engine, THINKING)
    content = ask(app, PATH, body(thinking=thinking)).json()["content"]
    assert [block.get("thinking", block.get("text")) for block in content] == ["", "Hi"]
    stream = ask(app, PATH, body(thinking=thinking, stream=True)).text
    assert "Hm" not in stream
    assert [value["content_block"]["type"] for name, value in events_of(stream) if name == "content_block_start"] == [
        "thinking",
        "text",
    ]
    assert engine.params[0].thinking_token_budget == 50
    assert engine.chats[0].chat_template_kwargs == {"enable_thinking": True, "thinking": True}


@pytest.mark.parametrize(
    ("finish_reason", "stop_reason", "pieces", "expected"),
    [
        ("stop", None, ["Hi"], ("end_turn", None)),
        ("length", None, ["Hi"], ("max_tokens", None)),
        ("stop", "END", ["Hi"], ("stop_sequence", "END")),
        ("deadline", None, ["Hi"], ("max_tokens", None)),
    ],
)
def test_stop_reasons_have_anthropics_names(
    finish_reason: str, stop_reason: str | None, pieces: list[str], expected: tuple[str, str | None]
) -> None:
    engine = FakeEngine(pieces)
    engine.finish_reason, engine.stop_reason = finish_reason, stop_reason
    app = app_of(engine)
    whole = ask(app, PATH, body(stop_sequences=["END"])).json()
    assert (whole["stop_reason"], whole["stop_sequence"]) == expected
    events = dict(events_of(ask(app, PATH, body(stop_sequences=["END"], stream=True)).text))
    assert tuple(events["message_delta"]["delta"].values()) == expected
    assert engine.params[0].stop == ["END"]


def test_a_call_that_max_tokens_cut_off_keeps_its_text() -> None:
    engine = FakeEngine(['<tool_call>\n{"name": "get_weather", "arguments": {"city": "R'])
    engine.finish_reason = "length"
    answer = ask(app_of(engine, THINKING), PATH, body(tools=[WEATHER])).json()
    assert answer["content"][-1]["input"] == {INVALID_JSON: '{"city": "R'}
    assert answer["stop_reason"] == "max_tokens"


def test_the_parameters_reach_the_engine() -> None:
    engine = FakeEngine(["{}"])
    request = body(
        system="Be brief.", temperature=0.5, top_p=0.9, top_k=7, cache_salt="s", tenant="t", priority=2,
        output_config={"format": {"type": "json_schema", "schema": SCHEMA}, "effort": "max"},
        metadata={"user_id": "u"}, service_tier="auto", context_management={"edits": []},
    )  # fmt: skip
    answer = ask(
        app_of(engine), f"{PATH}?beta=true", request, {"anthropic-version": "2023-06-01", "anthropic-beta": "x"}
    )
    assert answer.status_code == 200
    [params], [chat], [options] = engine.params, engine.chats, engine.options
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (16, 0.5, 0.9, 7)
    assert params.structured_outputs is not None
    assert params.structured_outputs.json is not None
    assert chat.messages[0] == {"role": "system", "content": "Be brief."}
    assert chat.chat_template_kwargs == {"reasoning_effort": "high"}
    assert (options["cache_salt"], options["scheduling"].tenant, options["scheduling"].priority) == ("s", "t", -2)


def test_an_assistant_message_at_the_end_is_continued() -> None:
    engine = FakeEngine(["B)"])
    messages = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "The best answer is ("}]
    assert ask(app_of(engine), PATH, body(messages=messages)).json()["content"] == [{"type": "text", "text": "B)"}]
    assert engine.chats[0].continue_final_message


@pytest.mark.parametrize(
    ("choice", "has_grammar", "shows_tools"),
    [
        ({"type": "auto"}, False, True),
        ({"type": "auto", "disable_parallel_tool_use": True}, True, True),
        ({"type": "any"}, True, True),
        ({"type": "tool", "name": "get_weather"}, True, True),
        ({"type": "none"}, False, False),
    ],
)
def test_tool_choice_makes_the_grammar(choice: dict[str, Any], has_grammar: bool, shows_tools: bool) -> None:
    engine = FakeEngine(ANSWER[3:])
    answer = ask(app_of(engine, THINKING), PATH, body(tools=[WEATHER], tool_choice=choice)).json()
    assert (engine.params[0].structured_outputs is not None) == has_grammar
    function = {key: WEATHER[key] for key in ("name", "description")} | {"parameters": WEATHER["input_schema"]}
    assert engine.chats[0].tools == ([{"type": "function", "function": function}] if shows_tools else None)
    assert answer["stop_reason"] == ("tool_use" if shows_tools else "end_turn")


def test_a_function_that_the_request_names_is_a_call_without_a_known_family() -> None:
    engine = FakeEngine(['{"city":', '"Rio"}'])
    request = body(tools=[WEATHER], tool_choice={"type": "tool", "name": "get_weather"})
    answer = ask(app_of(engine), PATH, request).json()
    assert [(block["name"], block["input"]) for block in answer["content"]] == [("get_weather", {"city": "Rio"})]
    assert answer["stop_reason"] == "tool_use"
    events = dict(events_of(ask(app_of(engine), PATH, request | {"stream": True}).text))
    assert events["message_delta"]["delta"]["stop_reason"] == "tool_use"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens (0)"),
        ({"temperature": 1.5}, "temperature (1.5) must lie in [0, 1]"),
        ({"stop_sequence": ["a"]}, "did you mean stop_sequences?"),
        ({"mcp_servers": [{}]}, "mcp_servers is not supported"),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            "tools[0] has the type web_search_20250305",
        ),
        ({"tools": [{"name": "a"}]}, "tools[0]: object missing required field `input_schema`"),
        ({"tools": [WEATHER | {"defer_loading": True}]}, "tools[0]: defer_loading is not supported"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name is missing"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, "x"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens (0) must be at least 1"),
        ({"output_config": {"task_budget": {}}}, "task_budget"),
    ],
)
def test_a_wrong_request_names_its_field_in_anthropics_shape(change: dict[str, Any], words: str) -> None:
    answer = ask(app_of(FakeEngine(), THINKING), PATH, body(**change))
    error = answer.json()
    assert (answer.status_code, error["type"], error["error"]["type"]) == (400, "error", "invalid_request_error")
    assert words in error["error"]["message"]
    assert answer.headers["request-id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InvalidRequest("the prompt is too long"), 400, "invalid_request_error"),
        (QueueFull("full", retry_after_s=2), 429, "rate_limit_error"),
        (EngineUnavailable("it starts"), 503, "overloaded_error"),
    ],
)
def test_an_error_before_the_first_token_has_its_own_status(
    error: Exception, status: int, kind: str, stream: bool
) -> None:
    answer = ask(app_of(FakeEngine([error])), PATH, body(stream=stream))
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind)


def test_an_error_in_a_stream_is_an_event() -> None:
    events = events_of(ask(app_of(FakeEngine(["Hi", QueueFull("full")])), PATH, body(stream=True)).text)
    assert events[-1] == ("error", {"error": {"type": "rate_limit_error", "message": "full"}})


def test_other_models_paths_and_keys_are_refused_in_anthropics_shape() -> None:
    app = app_of(FakeEngine(), keys=["k"])
    for path, headers, status, kind in (
        (PATH, {}, 401, "authentication_error"),
        (PATH, {"x-api-key": "k"}, 404, "not_found_error"),
        (f"{PATH}/batches", {"x-api-key": "k"}, 404, "not_found_error"),
    ):
        answer = ask(app, path, body(model="x"), headers)
        assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind)
        assert answer.headers["request-id"]


def test_tokens_are_counted_of_the_prompt_that_a_message_would_have() -> None:
    engine = FakeEngine()
    app = app_of(engine, THINKING)
    request = body(system="Be brief.", tools=[WEATHER], thinking={"type": "disabled"})
    ask(app, PATH, request)
    del request["max_tokens"]
    counted = ask(app, f"{PATH}/count_tokens", request)
    assert counted.json() == {"input_tokens": len("Be brief.Hello")}
    chat, _ = engine.tokenized[-1]
    assert chat == engine.chats[0]
    assert chat.chat_template_kwargs == {"reasoning_effort": "none", "enable_thinking": False, "thinking": False}
