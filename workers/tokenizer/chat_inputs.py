"""Reads and checks the JSON of a chat, and gives it the form that chat templates expect.

Clients are untrusted: the JSON may hold anything. Each error names the place, `messages[3].content[0]` for example, as
in the client's own request. The rules follow vLLM's chat API (`vllm/entrypoints/chat_utils.py`) where transformers'
`apply_chat_template` leaves a choice.
"""

from __future__ import annotations

import reprlib
from typing import Any, Final, NamedTuple

import msgspec

from ipc.chat import EncodedChat
from ipc.codec import MAX_ITEMS
from ipc.errors import InvalidRequest

MAX_JSON_VALUES: Final = 1_000_000  # of one field; a value takes up to 250 bytes of memory
_TEXT_PARTS: Final = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}  # type: its key
_REASONING: Final = ("reasoning_content", "reasoning", "thinking")  # names under which templates read one text
_OWN_FIELDS: Final = {  # variables of a template that have a field of their own
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize",
}  # fmt: skip

Object = dict[str, Any]


class ChatInputs(NamedTuple):
    """A checked chat. The content of a message is a text, or a list of {"type": "text", "text": ...}."""

    messages: list[Object]
    tools: list[Object] | None
    documents: list[Object] | None
    template_kwargs: Object


def read_chat(chat: EncodedChat) -> ChatInputs:
    """Parse and check a chat. Raises InvalidRequest, naming the field and the cure."""
    messages = _objects(chat.messages, "messages")
    if not messages:
        raise InvalidRequest("messages is empty: a chat has at least one message")
    kwargs = {} if chat.template_kwargs is None else _parse(chat.template_kwargs, "chat_template_kwargs")
    if not isinstance(kwargs, dict):
        raise InvalidRequest(f"chat_template_kwargs must be an object, not {_kind(kwargs)}")
    if taken := sorted(kwargs.keys() & _OWN_FIELDS):
        raise InvalidRequest(f"chat_template_kwargs must not hold {taken[0]!r}: it has a field of its own in the chat")
    tools = None if chat.tools is None else _objects(chat.tools, "tools")
    documents = None if chat.documents is None else _objects(chat.documents, "documents")
    return ChatInputs(
        [_message(message, f"messages[{i}]") for i, message in enumerate(messages)],
        [_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools)] if tools else None,
        documents,
        kwargs,
    )


def _parse(json: bytes, where: str) -> Any:
    """The value. An upper bound of the number of values in it is checked first, because each takes memory."""
    if sum(map(json.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        raise InvalidRequest(
            f"{where} holds more than {MAX_JSON_VALUES} values (commas and brackets in texts count too)"
        )
    try:
        return msgspec.json.decode(json)
    except RecursionError:
        raise InvalidRequest(f"{where} is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{where} is not JSON: {error}") from None


def _objects(json: bytes, where: str) -> list[Object]:
    value = _parse(json, where)
    if not isinstance(value, list):
        raise InvalidRequest(f"{where} must be a list, not {_kind(value)}")
    if len(value) > MAX_ITEMS:
        raise InvalidRequest(f"{where} has {len(value)} items; at most {MAX_ITEMS} are allowed")
    for i, each in enumerate(value):
        _check_object(each, f"{where}[{i}]")
    return value


def _message(message: Object, where: str) -> Object:
    """A message without keys whose value is null: many templates would write "None" for them."""
    message = {key: value for key, value in message.items() if value is not None}
    _check_text(message, "role", where)
    if "tool_calls" in message:
        calls = message["tool_calls"]
        if not isinstance(calls, list):
            raise InvalidRequest(f"{where}.tool_calls must be a list, not {_kind(calls)}")
        message["tool_calls"] = [_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
        if not calls:
            del message["tool_calls"]
    message["content"] = _content(message, where)
    for key in ("name", "tool_call_id"):
        if key in message:
            _check_text(message, key, where)
    reasoning = next((text for key in _REASONING if isinstance(text := message.get(key), str)), None)
    return message if reasoning is None else {**dict.fromkeys(_REASONING, reasoning), **message}


def _content(message: Object, where: str) -> str | list[Object]:
    content = message.get("content")
    if content is None:
        if message["role"] != "assistant" and "tool_calls" not in message:
            raise InvalidRequest(f"{where}.content is missing: give a text, or a list of text parts")
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{where}.content must be a text or a list of text parts, not {_kind(content)}")
    return [_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]


def _part(part: Any, where: str) -> Object:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    _check_object(part, where)
    kind = part.get("type", "text")
    if not isinstance(kind, str) or kind not in _TEXT_PARTS:
        raise InvalidRequest(f"{where}: type {_quoted(kind)} is not supported: this engine serves text")
    key = _TEXT_PARTS[kind]
    _check_text(part, key, where)
    return {"type": "text", "text": part[key]}


def _tool_call(call: Any, where: str) -> Object:
    """A call whose arguments are an object: OpenAI's API has them as JSON in a string, templates expect the object."""
    _check_object(call, where)
    inner = call.get("function")
    if inner is None:  # transformers takes the function's name and arguments without the shell too
        return _function_call(call, where)
    _check_object(inner, f"{where}.function")
    return {**call, "function": _function_call(inner, f"{where}.function")}


def _function_call(function: Object, where: str) -> Object:
    _check_text(function, "name", where)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        text = arguments.strip()
        arguments = _parse(text.encode(), f"{where}.arguments") if text else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict | list):
        raise InvalidRequest(f"{where}.arguments must be an object, or a string with an object as JSON")
    return {**function, "arguments": arguments}


def _tool(tool: Object, where: str) -> Object:
    """A tool as OpenAI writes it; a function alone gets the shell around it."""
    if "type" not in tool and "function" not in tool and "name" in tool:
        tool = {"type": "function", "function": tool}
    kind = tool.get("type", "function")
    if kind != "function":
        raise InvalidRequest(f'{where}: type {_quoted(kind)} is not supported: a tool is of type "function"')
    _check_object(tool.get("function"), f"{where}.function")
    _check_text(tool["function"], "name", f"{where}.function")
    return tool


def _check_object(value: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{where} must be an object, not {_kind(value)}")


def _check_text(owner: Object, key: str, where: str) -> None:
    value = owner.get(key)
    if not isinstance(value, str):
        problem = "is missing" if value is None else f"must be a text, not {_kind(value)}"
        raise InvalidRequest(f"{where}.{key} {problem}")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _quoted(value: Any) -> str:
    return f'"{reprlib.repr(value)[1:-1]}"' if isinstance(value, str) else reprlib.repr(value)
