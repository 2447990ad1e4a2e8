"""The input of a request as items, checked and in one form. Knows neither the store nor chats.

A string is one message of the user. A message's content becomes a list of parts, and each item without an id gets one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from pipeline.http.errors import HttpError

Item = dict[str, Any]

_ROLES: Final = ("user", "assistant", "system", "developer")
_TEXT_PARTS: Final = ("input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text")


def read_items(given: str | list[dict[str, Any]], response_hex: str) -> list[Item]:
    """The items of a request's input. Raises HttpError 400, naming the place.

    Args:
        given: `input` of the request.
        response_hex: the response's id without its prefix. The ids of its items begin with it, so that the store can
            find an item by its id.
    """
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not given:
        raise item_error("input", "is missing or empty: give a string, or a list of at least one item")
    items = []
    for i, item in enumerate(given):
        where = f"input[{i}]"
        kind = item.get("type") or ("message" if "role" in item else None)
        reader = _READERS.get(kind) if isinstance(kind, str) else None
        if reader is None:
            raise item_error(f"{where}.type", f"({str(kind)[:100]!r}) is not supported: use {', '.join(_READERS)}")
        prefix, read = reader
        value = read(item, where)
        given_id = _optional_string(item, "id", where)
        items.append({"id": given_id or f"{prefix}_{response_hex}i{i}", **value})
    return items


def text_of(parts: list[Item]) -> str:
    """The text of a content. Its parts follow one another without a separator."""
    return "".join(part["text"] if "text" in part else part["refusal"] for part in parts)


def item_error(where: str, problem: str, *, status: int = 400, code: str | None = None) -> HttpError:
    """Name one place of the input in an error's message and its `param`."""
    return HttpError(status, f"{where} {problem}", param=where, code=code)


def _message(item: Item, where: str) -> Item:
    role = item.get("role")
    if role not in _ROLES:
        raise item_error(f"{where}.role", f"({str(role)[:100]!r}) must be {', '.join(_ROLES[:-1])} or {_ROLES[-1]}")
    kind = "output_text" if role == "assistant" else "input_text"
    content = _parts(item.get("content"), kind, f"{where}.content")
    message: Item = {"type": "message", "role": role, "content": content, "status": "completed"}
    phase = _optional_string(item, "phase", where)  # of the assistant's messages; templates do not read it
    return message if phase is None else message | {"phase": phase}


def _parts(content: Any, kind: str, where: str) -> list[Item]:
    if isinstance(content, str):
        return [_part(content, kind)]
    if not isinstance(content, list):
        raise item_error(where, "must be a string or a list of parts")
    parts = []
    for i, part in enumerate(content):
        place = f"{where}[{i}]"
        given = part.get("type") if isinstance(part, dict) else None
        if given not in _TEXT_PARTS:
            raise item_error(
                f"{place}.type", f"({str(given)[:100]!r}) is not supported: this server reads text, as type {kind!r}"
            )
        text = _string(part, "refusal" if given == "refusal" else "text", place)
        parts.append({"type": "refusal", "refusal": text} if given == "refusal" else _part(text, kind))
    return parts


def _part(text: str, kind: str) -> Item:
    part: Item = {"type": kind, "text": text}
    return part | {"annotations": [], "logprobs": []} if kind == "output_text" else part


def _function_call(item: Item, where: str) -> Item:
    return {
        "type": "function_call", "call_id": _string(item, "call_id", where), "name": _string(item, "name", where),
        "arguments": _string(item, "arguments", where), "status": "completed",
    }  # fmt: skip


def _function_call_output(item: Item, where: str) -> Item:
    output = item.get("output")
    if not isinstance(output, str):
        output = _parts(output, "input_text", f"{where}.output")
    return {
        "type": "function_call_output", "call_id": _string(item, "call_id", where), "output": output,
        "status": "completed",
    }  # fmt: skip


def _reasoning(item: Item, where: str) -> Item:
    content, summary = item.get("content"), item.get("summary")
    return {
        "type": "reasoning",
        "summary": [] if summary is None else _parts(summary, "summary_text", f"{where}.summary"),
        "content": [] if content is None else _parts(content, "reasoning_text", f"{where}.content"),
    }


def _item_reference(item: Item, where: str) -> Item:
    _string(item, "id", where)
    return {"type": "item_reference"}


_READERS: Final[dict[str, tuple[str, Callable[[Item, str], Item]]]] = {  # type -> prefix of ids, reader
    "message": ("msg", _message),
    "function_call": ("fc", _function_call),
    "function_call_output": ("fco", _function_call_output),
    "reasoning": ("rs", _reasoning),
    "item_reference": ("ref", _item_reference),
}


def _string(item: Item, key: str, where: str) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        raise item_error(f"{where}.{key}", "is missing" if value is None else "must be a string")
    return value


def _optional_string(item: Item, key: str, where: str) -> str | None:
    return None if item.get(key) is None else _string(item, key, where)
