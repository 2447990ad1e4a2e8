"""Chats of the SDK: what plain dictionaries become on the way, and which mistakes are named here."""

from __future__ import annotations

import json
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from ipc.errors import InvalidRequest
from pipeline import Chat
from pipeline.client.async_client import DEFAULT_PARAMS
from pipeline.client.chat_input import encode_chat
from pipeline.client.inputs import batch_of

HI = {"role": "user", "content": "hi ü"}


def refusal(chat: Chat) -> str:
    with pytest.raises(InvalidRequest) as caught:
        encode_chat(chat)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_chat_travels_with_every_key_of_its_messages_and_tools() -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "x"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "content": "1", "tool_call_id": "c", "extra": {"deep": [1.5, True, None]}},
    ]
    chat = Chat(messages, tools=[{"type": "function"}], documents=[{"text": "d"}], chat_template="rag",
                chat_template_kwargs={"enable_thinking": False})  # fmt: skip
    encoded = encode_chat(chat)
    assert json.loads(encoded.messages) == messages
    assert json.loads(encoded.tools or b"") == [{"type": "function"}]
    assert json.loads(encoded.documents or b"") == [{"text": "d"}]
    assert json.loads(encoded.template_kwargs or b"") == {"enable_thinking": False}
    assert encoded.template == "rag"
    plain = encode_chat(Chat([HI]))
    assert (plain.messages, plain.tools, plain.template_kwargs) == (
        '[{"role":"user","content":"hi ü"}]'.encode(),
        None,
        None,
    )


def test_mappings_sequences_and_numbers_of_any_class_travel() -> None:
    odd = MappingProxyType(
        {"role": np.str_("user"), "content": "x", "n": np.int64(3), "f": np.float32(0.5), "t": (1, 2)}
    )
    assert json.loads(encode_chat(Chat((odd,))).messages) == [
        {"role": "user", "content": "x", "n": 3, "f": 0.5, "t": [1, 2]}
    ]


@pytest.mark.parametrize(
    ("options", "begins", "continues"),
    [
        ({}, True, False),
        ({"continue_final_message": True}, False, True),
        ({"add_generation_prompt": False}, False, False),
        ({"add_generation_prompt": False, "continue_final_message": True}, False, True),
    ],
)
def test_an_answer_begins_unless_the_last_message_goes_on(
    options: dict[str, Any], begins: bool, continues: bool
) -> None:
    encoded = encode_chat(Chat([HI], **options))
    assert (encoded.add_generation_prompt, encoded.continue_final_message) == (begins, continues)


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


MISTAKES: dict[str, tuple[Chat, str]] = {
    "no messages": (Chat([]), "messages is empty"),
    "a text": (Chat("hi"), "messages ('hi') must be a list of dictionaries"),  # type: ignore[arg-type]
    "a text among messages": (Chat([HI, "x"]), "messages[1] ('x') must be a dictionary"),  # type: ignore[list-item]
    "too many messages": (Chat([HI] * 16_385), "messages has 16385 items; at most 16384 are allowed"),
    "bytes": (Chat([HI, {"role": b"user"}]), "messages[1] cannot be sent as JSON: bytes is not a JSON value"),
    "a set": (Chat([HI], tools=[{"a": {1}}]), "tools[0] cannot be sent as JSON: set is not a JSON value"),
    "not a number": (Chat([{"role": "user", "x": float("nan")}]), "messages[0] cannot be sent as JSON: Out of range"),
    "a lone surrogate": (Chat([{"role": "user", "content": "\ud800"}]), "messages[0]: text with a lone surrogate"),
    "too deep": (Chat([{**HI, "x": nested(100_000)}]), "messages[0] cannot be sent as JSON: maximum recursion depth"),
    "a tool as text": (Chat([HI], tools=["f"]), "tools[0] ('f') must be a dictionary"),  # type: ignore[list-item]
    "tools as mapping": (Chat([HI], tools={}), "tools ({}) must be a list"),  # type: ignore[arg-type]
    "a document as text": (Chat([HI], documents=["d"]), "documents[0] ('d')"),  # type: ignore[list-item]
    "variables as list": (Chat([HI], chat_template_kwargs=[]), "chat_template_kwargs ([])"),  # type: ignore[arg-type]
    "a template as number": (Chat([HI], chat_template=5), "chat_template (5) must be a string"),  # type: ignore[arg-type]
    "a number as switch": (
        Chat([HI], continue_final_message=1),  # type: ignore[arg-type]
        "continue_final_message (1) must be True or False",
    ),
    "both ends": (
        Chat([HI], add_generation_prompt=True, continue_final_message=True),
        "add_generation_prompt and continue_final_message are both True",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_with_its_place(name: str) -> None:
    chat, text = MISTAKES[name]
    assert refusal(chat).startswith(text)


def test_chats_in_a_batch_are_prompts_and_one_chat_is_no_batch() -> None:
    chat = Chat([HI])
    assert batch_of([chat, [HI], "x"], DEFAULT_PARAMS)[0] == [chat, [HI], "x"]
    with pytest.raises(InvalidRequest, match="use generate for one prompt"):
        batch_of(chat, DEFAULT_PARAMS)  # type: ignore[arg-type]
