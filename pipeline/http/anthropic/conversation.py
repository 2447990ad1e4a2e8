"""Turns the messages of Anthropic's API into messages as chat templates and OpenAI's API have them.

A message of a user may hold results of tools beside text. Each result becomes a message of the role "tool", at its
place. Consecutive messages of one role become one message, as Anthropic's API defines.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

from pipeline.http.errors import HttpError

Object = dict[str, Any]

# Claude Code puts a hash of each request into this block of the system prompt. It would defeat the prefix cache.
_BILLING: Final = "x-anthropic-billing-header"
_ROLES: Final = ("user", "assistant", "system")
_MERGED: Final = ("user", "assistant", "system")
_ERROR: Final = "Error: "  # chat templates have no other way to say that a tool failed


def chat_messages(system: str | list[Any] | None, messages: list[Object]) -> list[Object]:
    """The messages for `Chat`. Raises HttpError 400, naming the place in the request."""
    merged: list[Object] = []
    parts = [part for part in _texts(system, "system") if not part["text"].startswith(_BILLING)] if system else []
    if parts:
        merged.append({"role": "system", "content": parts})
    if not messages:
        raise _error("messages", "is empty: a request has at least one message")
    for i, message in enumerate(messages):
        for each in _converted(message, f"messages[{i}]"):
            _add(merged, each)
    for message in merged:
        message["content"] = _plain(message["content"])
    return merged


def continues_answer(messages: list[Object]) -> bool:
    """Whether the last message begins the answer, which the model then continues. Raises HttpError 400."""
    last = messages[-1]
    if last["role"] != "assistant":
        return False
    where = f"messages[{len(messages) - 1}]"
    content = last.get("content")
    blocks = content if isinstance(content, list) else []
    if any(block.get("type") == "tool_use" for block in blocks):
        raise _error(where, "ends the request with tool_use: send the result of the tool as a tool_result block")
    if not content or (blocks and blocks[-1].get("type") != "text"):
        raise _error(where, "is the beginning of the answer and must end with text: add text, or leave it out")
    return True


def _converted(message: Object, where: str) -> Iterator[Object]:
    role = message.get("role")
    if role not in _ROLES:
        raise _error(f"{where}.role", f"({str(role)[:100]!r}) must be user, assistant or system")
    content = message.get("content")
    if content is None or not isinstance(content, str | list):
        raise _error(f"{where}.content", "must be a string or a list of content blocks")
    if role == "assistant":
        yield _assistant(content, where)
    elif role == "system":
        yield {"role": role, "content": _texts(content, f"{where}.content")}
    else:
        yield from _user(content, where)


def _user(content: str | list[Any], where: str) -> Iterator[Object]:
    texts: list[Object] = []
    for block, place in _blocks(content, f"{where}.content"):
        match block["type"]:
            case "text":
                texts.append(_text_part(block, place))
            case "tool_result":
                if texts:
                    yield {"role": "user", "content": texts}
                    texts = []
                yield _tool_result(block, place)
            case other:
                raise _unsupported(other, place, "text and tool_result")
    if texts or not content:
        yield {"role": "user", "content": texts}


def _tool_result(block: Object, where: str) -> Object:
    parts = _texts(block.get("content") or "", f"{where}.content")
    if block.get("is_error"):
        parts = [{"type": "text", "text": _ERROR}, *parts]
        parts = [{"type": "text", "text": "".join(part["text"] for part in parts)}]
    return {"role": "tool", "tool_call_id": _string(block, "tool_use_id", where), "content": parts}


def _assistant(content: str | list[Any], where: str) -> Object:
    texts: list[Object] = []
    thoughts: list[str] = []
    calls: list[Object] = []
    for block, place in _blocks(content, f"{where}.content"):
        match block["type"]:
            case "text":
                texts.append(_text_part(block, place))
            case "thinking":
                thoughts.append(_string(block, "thinking", place))
            case "redacted_thinking":  # encrypted by another server, so there is no text for the model
                pass
            case "tool_use":
                calls.append(_tool_use(block, place))
            case other:
                raise _unsupported(other, place, "text, thinking, redacted_thinking and tool_use")
    message: Object = {"role": "assistant", "content": texts}
    if any(thoughts):
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _tool_use(block: Object, where: str) -> Object:
    arguments = block.get("input")
    if not isinstance(arguments, dict):
        raise _error(f"{where}.input", "must be an object")
    function = {"name": _string(block, "name", where), "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": _string(block, "id", where), "type": "function", "function": function}


def _texts(content: Any, where: str) -> list[Object]:
    """The parts of a content that may hold text only."""
    parts = []
    for block, place in _blocks(content, where):
        if block["type"] != "text":
            raise _unsupported(block["type"], place, "text")
        parts.append(_text_part(block, place))
    return parts


def _blocks(content: Any, where: str) -> Iterator[tuple[Object, str]]:
    """The blocks of a content with their places. A string is one block of text; an empty one is none."""
    if isinstance(content, str):
        if content:
            yield {"type": "text", "text": content}, where
        return
    if not isinstance(content, list):
        raise _error(where, "must be a string or a list of content blocks")
    for i, block in enumerate(content):
        place = f"{where}[{i}]"
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise _error(place, 'must be a content block, such as {"type": "text", "text": "..."}')
        yield block, place


def _text_part(block: Object, where: str) -> Object:
    return {"type": "text", "text": _string(block, "text", where)}


def _string(block: Object, key: str, where: str) -> str:
    value = block.get(key)
    if not isinstance(value, str):
        raise _error(f"{where}.{key}", "is missing" if value is None else "must be a string")
    return value


def _add(messages: list[Object], message: Object) -> None:
    """Append a message, or add it to the last one if both have the same role."""
    last = messages[-1] if messages else None
    if last is None or last["role"] != message["role"] or message["role"] not in _MERGED:
        messages.append(message)
        return
    last["content"] += message["content"]
    if "reasoning_content" in message:
        last["reasoning_content"] = last.get("reasoning_content", "") + message["reasoning_content"]
    if "tool_calls" in message:
        last.setdefault("tool_calls", []).extend(message["tool_calls"])


def _plain(parts: list[Object]) -> str | list[Object]:
    """One text, or none, as a string: every chat template reads that."""
    if len(parts) > 1:
        return parts
    return parts[0]["text"] if parts else ""


def _unsupported(kind: str, where: str, supported: str) -> HttpError:
    return _error(where, f"is a block of type {kind[:100]}, which this server does not support: it takes {supported}")


def _error(where: str, problem: str) -> HttpError:
    return HttpError(400, f"{where} {problem}", param=where)
