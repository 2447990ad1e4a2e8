"""`/v1/chat/completions`: whole answers and streams of them. `generation/` has the tests of tools and grammars."""

from __future__ import annotations

from typing import Any

import pytest

from ipc.errors import EngineUnavailable, QueueFull
from pipeline.http.parsing.formats import OutputFormat
from tests.unit.pipeline.http.application import app_of, ask, stream_of
from tests.unit.pipeline.http.fake_engine import FakeEngine, logprob_of

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "ab"}]
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("now", "add")]
CALLS = [f'<tool_call>\n{{"name": "{name}", "arguments": {{"a": 1}}}}\n</tool_call>' for name in ("now", "add")]
TAGS_OF_MANY_TOKENS = OutputFormat("hermes", "think", False, ("<think>", "</think>"))


def answered(engine: FakeEngine, format: OutputFormat | None = None, **body: Any) -> Any:
    answer = ask(app_of(engine, format), PATH, {"messages": MESSAGES, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def streamed(engine: FakeEngine, format: OutputFormat | None = None, **body: Any) -> list[dict[str, Any]]:
    return stream_of(app_of(engine, format), PATH, {"messages": MESSAGES, **body})


def message_of(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """The message that the deltas of a choice make up."""
    message: dict[str, Any] = {"content": None}
    calls: list[dict[str, Any]] = []
    for choice in (choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index):
        for name, value in choice["delta"].items():
            if name != "tool_calls":
                message[name] = (message.get(name) or "") + value
                continue
            for delta in value:
                if delta["index"] == len(calls):
                    calls.append(
                        {"type": delta["type"], "function": {"name": delta["function"]["name"], "arguments": ""}}
                    )
                    assert delta["id"].startswith("call_")
                calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]
    return message | ({"tool_calls": calls} if calls else {})


def pieces_of(text: str, size: int = 3) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


def test_a_stream_makes_up_the_whole_message_with_its_reasoning_and_calls() -> None:
    engine = FakeEngine(pieces_of("<think>Hmm</think>Both. " + "\n".join(CALLS)))
    whole = answered(engine, TAGS_OF_MANY_TOKENS, tools=TOOLS)
    (choice,) = whole["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["reasoning_content"], message["reasoning"]) == ("Hmm", "Hmm")
    assert [each["function"]["name"] for each in message["tool_calls"]] == ["now", "add"]
    assert whole["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    chunks = streamed(engine, TAGS_OF_MANY_TOKENS, tools=TOOLS)
    found = message_of(chunks)
    for call in message["tool_calls"]:
        assert call.pop("id").startswith("call_")
    assert {name: message[name] for name in found if name != "content"} == {
        k: v for k, v in found.items() if k != "content"
    }
    assert found["content"].strip() == message["content"].strip() == "Both."
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_the_first_chunk_of_each_sample_has_the_role_and_each_output_is_an_event() -> None:
    chunks = streamed(FakeEngine(["a", "b"]), n=2)
    assert [chunk["choices"][0]["delta"].get("role") for chunk in chunks] == [
        "assistant",
        None,
        "assistant",
        None,
        None,
        None,
    ]
    assert [message_of(chunks, index)["content"] for index in (0, 1)] == ["ab", "1ab"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 4 + ["stop"] * 2
    assert not any("usage" in chunk for chunk in chunks)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_usage_comes_at_the_end_or_in_every_chunk() -> None:
    engine = FakeEngine(["a", "bc"])
    usage = answered(engine)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (2, 3, 5)
    last = streamed(engine, stream_options={"include_usage": True})
    assert [chunk["usage"] for chunk in last] == [None] * (len(last) - 1) + [usage]
    always = streamed(engine, stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [(chunk["usage"]["prompt_tokens"], chunk["usage"]["completion_tokens"]) for chunk in always]
    assert counts == [(2, 1), (2, 1), (2, 3), (2, 3)]
    assert [chunk["usage"] for chunk in always[2:]] == [usage, usage]


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_have_the_likeliest_and_the_requested_tokens(stream: bool) -> None:
    engine = FakeEngine(["é", "x"])
    body = {"logprobs": True, "top_logprobs": 1, "logprob_token_ids": [122]}
    choices = (
        [chunk["choices"][0] for chunk in streamed(engine, **body)] if stream else answered(engine, **body)["choices"]
    )
    rows = [row for choice in choices for row in (choice["logprobs"] or {"content": []})["content"]]
    assert b"".join(bytes(row["bytes"]) for row in rows).decode() == "éx"
    assert [row["logprob"] for row in rows] == [logprob_of(byte) for byte in "éx".encode()]
    assert [each["token"] for each in rows[-1]["top_logprobs"]] == ["A", "z"]


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_can_be_named_by_their_ids(stream: bool) -> None:
    engine = FakeEngine(["x"])
    body = {"logprobs": True, "top_logprobs": 1, "return_tokens_as_token_ids": True}
    choices = (
        [chunk["choices"][0] for chunk in streamed(engine, **body)] if stream else answered(engine, **body)["choices"]
    )
    (row,) = [row for choice in choices for row in (choice["logprobs"] or {"content": []})["content"]]
    assert (row["token"], row["top_logprobs"][0]["token"]) == ("token_id:120", "token_id:65")


def test_token_ids_come_with_prompt_and_output() -> None:
    engine = FakeEngine(["x", "y"])
    whole = answered(engine, return_token_ids=True)
    assert (whole["prompt_token_ids"], whole["choices"][0]["token_ids"]) == ([97, 98], [120, 121])
    assert answered(engine, return_token_ids=True, truncate_prompt_tokens=1)["prompt_token_ids"] == [98]
    chunks = streamed(engine, return_token_ids=True, stream_options={"include_usage": True})
    assert [chunk.get("prompt_token_ids") for chunk in chunks] == [[97, 98]] + [None] * (len(chunks) - 1)
    ids = [token_id for chunk in chunks for each in chunk["choices"] for token_id in each.get("token_ids", [])]
    assert ids == [120, 121]
    assert "prompt_token_ids" not in answered(engine)


def test_prompt_log_probabilities_come_with_a_whole_answer() -> None:
    rows = answered(FakeEngine(["x"]), prompt_logprobs=1)["prompt_logprobs"]
    assert rows[0] is None
    assert rows[1]["98"] == {"logprob": logprob_of(98), "rank": None, "decoded_token": "b"}
    assert rows[1]["65"] == {"logprob": logprob_of(65), "rank": 1, "decoded_token": "A"}


def test_the_id_of_an_answer_holds_the_request_id_of_the_body() -> None:
    engine = FakeEngine(["x"])
    assert answered(engine, request_id="mine")["id"] == "chatcmpl-mine"
    assert {chunk["id"] for chunk in streamed(engine, request_id="mine")} == {"chatcmpl-mine"}
    assert len({options["request_id"] for options in engine.options}) == 2


def test_max_completion_tokens_wins_over_max_tokens_and_neither_means_the_models_length() -> None:
    engine = FakeEngine(["x"])
    answered(engine, max_tokens=5, max_completion_tokens=7)
    answered(engine, max_tokens=5)
    answered(engine)
    assert [params.max_tokens for params in engine.params] == [7, 5, None]


def test_an_answer_continues_the_last_message_in_its_role() -> None:
    engine = FakeEngine(["x"])
    messages = [*MESSAGES, {"role": "assistant", "content": "Well"}]
    body: dict[str, Any] = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    assert answered(engine, **body)["choices"][0]["message"]["role"] == "assistant"
    assert engine.chats[-1].continue_final_message
    assert message_of(streamed(engine, **body))["role"] == "assistant"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": "ab"}, "messages"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"temperature": 3}, "temperature"),
        ({"stream": True, "prompt_logprobs": 0}, "prompt_logprobs"),
        ({"audio": {"voice": "a"}}, "audio"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"max_token": 3}, "max_token"),
    ],
)
def test_a_body_that_cannot_be_honoured_is_refused_by_field(body: dict[str, Any], param: str) -> None:
    engine = FakeEngine()
    answer = ask(app_of(engine), PATH, {"messages": MESSAGES, **body})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert not engine.params


@pytest.mark.parametrize(
    ("error", "status"),
    [(QueueFull("full", 2.0), 429), (EngineUnavailable("it starts"), 503), (ZeroDivisionError(), 500)],
)
def test_a_stream_that_fails_before_its_first_event_has_the_status_of_its_error(error: Exception, status: int) -> None:
    answer = ask(app_of(FakeEngine([error])), PATH, {"messages": MESSAGES, "stream": True})
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    after = ask(app_of(FakeEngine(["x", error])), PATH, {"messages": MESSAGES, "stream": True})
    assert after.status_code == 200
    assert '"error"' in after.text
    assert after.text.endswith("data: [DONE]\n\n")


def test_a_deadline_with_text_ends_as_a_length_and_without_text_as_status_408() -> None:
    engine = FakeEngine(["x"])
    engine.finish_reason = "deadline"
    (choice,) = answered(engine, deadline_s=1)["choices"]
    assert (choice["finish_reason"], choice["stop_reason"], choice["message"]["content"]) == ("length", "deadline", "x")
    assert engine.options[-1]["scheduling"].deadline_s == 1
    engine.pieces = [""]
    assert ask(app_of(engine), PATH, {"messages": MESSAGES}).status_code == 408
