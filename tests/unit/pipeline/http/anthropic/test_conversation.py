"""Messages of Anthropic's API as messages for chat templates."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.http.anthropic.conversation import chat_messages, continues_answer
from pipeline.http.errors import HttpError


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def assistant(*content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(content)}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def result(content: Any, **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "t1", "content": content, **more}


CALL = {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Köln"}}
CALLED = {"id": "t1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Köln"}'}}


def test_a_call_its_result_and_the_thinking_before_it_keep_their_places() -> None:
    messages = [
        {"role": "user", "content": "Weather?"},
        assistant(
            {"type": "thinking", "thinking": "I look.", "signature": "s"},
            {"type": "redacted_thinking", "data": "xyz"},
            text("One moment."),
            CALL,
        ),
        user(result([text("rain"), text("wind")]), text("And now?")),
    ]
    assert chat_messages("Be brief.", messages) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "One moment.", "reasoning_content": "I look.", "tool_calls": [CALLED]},
        {"role": "tool", "tool_call_id": "t1", "content": [text("rain"), text("wind")]},
        {"role": "user", "content": "And now?"},
    ]


def test_the_result_of_a_failed_tool_says_so_and_may_be_empty() -> None:
    messages = [user(result("no such city", is_error=True)), user(result([], is_error=True)), user(result(None))]
    converted = chat_messages(None, messages)
    assert [message["content"] for message in converted] == ["Error: no such city", "Error: ", ""]
    assert {message["role"] for message in converted} == {"tool"}


def test_consecutive_messages_of_one_role_become_one() -> None:
    messages = [user(text("a")), {"role": "user", "content": "b"}, assistant(CALL), assistant(text("c"), CALL)]
    assert chat_messages(None, messages) == [
        {"role": "user", "content": [text("a"), text("b")]},
        {"role": "assistant", "content": "c", "tool_calls": [CALLED, CALLED]},
    ]


def test_blocks_of_the_system_prompt_become_one_message_without_the_hash_of_the_request() -> None:
    blocks = [
        text("x-anthropic-billing-header: cch=1a2b3;"),
        {**text("You code."), "cache_control": {"type": "ephemeral"}},
        text("Well."),
    ]
    late = {"role": "system", "content": "Stop now."}
    assert chat_messages(blocks, [user(text("a")), late]) == [
        {"role": "system", "content": [text("You code."), text("Well.")]},
        {"role": "user", "content": "a"},
        late,
    ]


@pytest.mark.parametrize(
    ("system", "messages", "error"),
    [
        (None, [], "messages is empty"),
        (None, [{"role": "tool", "content": "a"}], "messages[0].role ('tool') must be user, assistant or system"),
        (None, [{"role": "user"}], "messages[0].content must be a string or a list of content blocks"),
        (None, [user("a")], "messages[0].content[0] must be a content block"),
        (None, [user({"type": "text"})], "messages[0].content[0].text is missing"),
        (None, [user(text("a"), {"type": "image", "source": {}})], "messages[0].content[1] is a block of type image"),
        (None, [user({"type": "document", "source": {}})], "type document, which this server does not support"),
        (None, [user(result([{"type": "image"}]))], "messages[0].content[0].content[0] is a block of type image"),
        (None, [user(CALL)], "type tool_use, which this server does not support: it takes text and tool_result"),
        (None, [assistant({"type": "server_tool_use"})], "messages[0].content[0] is a block of type server_tool_use"),
        (None, [assistant({**CALL, "input": "{}"})], "messages[0].content[0].input must be an object"),
        (None, [user({"type": "tool_result"})], "messages[0].content[0].tool_use_id is missing"),
        ([{"type": "image"}], [user(text("a"))], "system[0] is a block of type image"),
    ],
)
def test_an_error_names_the_place_in_the_request(system: Any, messages: list[Any], error: str) -> None:
    with pytest.raises(HttpError) as raised:
        chat_messages(system, messages)
    assert raised.value.status == 400
    assert error in raised.value.message
    assert "\n" not in raised.value.message


def test_the_beginning_of_an_answer_must_end_with_text() -> None:
    assert continues_answer([user(text("a")), assistant(text("So"))])
    assert continues_answer([{"role": "assistant", "content": "So"}])
    assert not continues_answer([user(text("a"))])
    for last in (assistant(CALL), assistant(), assistant({"type": "thinking", "thinking": "a"})):
        with pytest.raises(HttpError, match=r"^messages\[1\] "):
            continues_answer([user(text("a")), last])
