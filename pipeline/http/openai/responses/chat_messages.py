"""Turns the items of a conversation into the messages of a chat, as chat templates know them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.http.openai.responses.input_items import Item, item_error, text_of

Message = dict[str, Any]


def chat_messages(instructions: str | None, items: Sequence[Item]) -> list[Message]:
    """The messages. Raises HttpError 400 for the result of a call that the conversation does not have.

    Reasoning, text and calls of one turn are separate items, and they become one message. Messages of
    the developer have the role "system". `instructions` and the system messages at the beginning are one message,
    because many templates read the first system message only.
    """
    messages: list[Message] = [] if not instructions else [{"role": "system", "content": instructions}]
    names: dict[str, str] = {}  # of the calls, by id
    for item in items:
        match item["type"]:
            case "message":
                _add_text(messages, item)
            case "reasoning":
                if text := text_of(item["content"]) or text_of(item["summary"]):
                    _open_turn(messages, ("content", "tool_calls", "reasoning_content"))["reasoning_content"] = text
            case "function_call":
                names[item["call_id"]] = item["name"]
                call = {"name": item["name"], "arguments": item["arguments"]}
                calls = _open_turn(messages, ()).setdefault("tool_calls", [])
                calls.append({"id": item["call_id"], "type": "function", "function": call})
            case "function_call_output":
                messages.append(_tool_message(item, names))
            case other:
                raise AssertionError(f"items of type {other} are resolved before")
    return messages


def _add_text(messages: list[Message], item: Item) -> None:
    role, text = item["role"], text_of(item["content"])
    if role == "assistant":
        _open_turn(messages, ("content", "tool_calls"))["content"] = text
    elif role in ("system", "developer"):
        if len(messages) == 1 and messages[0]["role"] == "system":
            messages[0]["content"] += "\n\n" + text
        else:
            messages.append({"role": "system", "content": text})
    else:
        messages.append({"role": role, "content": text})


def _open_turn(messages: list[Message], taken: tuple[str, ...]) -> Message:
    """The assistant's last message, or a new one if it has any of the keys in `taken` already."""
    last = messages[-1] if messages else None
    if last is None or last["role"] != "assistant" or any(last.get(key) for key in taken):
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _tool_message(item: Item, names: dict[str, str]) -> Message:
    call_id, output = item["call_id"], item["output"]
    if call_id not in names:
        raise item_error(
            "input",
            f"has the output of the unknown call {call_id[:100]!r}: send its function_call too, or give the "
            "previous_response_id of the response that has the call",
        )
    text = output if isinstance(output, str) else text_of(output)
    return {"role": "tool", "tool_call_id": call_id, "name": names[call_id], "content": text}
