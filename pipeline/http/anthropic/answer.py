"""Writes a whole answer as a message of Anthropic's API, and the values that answers and events share."""

from __future__ import annotations

from typing import Any

import msgspec

from pipeline.http.generation.chat_run import Answer, RunUsage
from pipeline.http.generation.endings import OpenAIFinish
from pipeline.http.service import new_id

# Anthropic's documentation proposes this key for a call whose arguments are no JSON object.
INVALID_JSON = "INVALID_JSON"


def message_value(
    message_id: str, model: str, content: list[dict[str, Any]], ending: dict[str, Any], usage: dict[str, Any]
) -> dict[str, Any]:
    """A message, whole or at its start."""
    return {
        "id": message_id, "type": "message", "role": "assistant", "model": model, "content": content, **ending,
        "usage": usage,
    }  # fmt: skip


def content_blocks(answer: Answer, *, shows_thinking: bool) -> list[dict[str, Any]]:
    """The blocks of a whole answer: its thinking, its text, its calls of tools."""
    blocks: list[dict[str, Any]] = []
    if answer.reasoning:
        thinking = answer.reasoning if shows_thinking else ""
        blocks.append({"type": "thinking", "thinking": thinking, "signature": new_signature()})
    if answer.content:
        blocks.append({"type": "text", "text": answer.content})
    blocks += [
        tool_use_value(call.call_id or new_call_id(), call.name, _input(call.arguments)) for call in answer.tool_calls
    ]
    return blocks


def tool_use_value(call_id: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A block with a call of a tool."""
    return {"type": "tool_use", "id": call_id, "name": name, "input": arguments}


def _input(arguments: str) -> dict[str, Any]:
    """The arguments as an object. Text that is none, such as a call that max_tokens cut off, is kept as text."""
    if not arguments.strip():
        return {}
    try:
        value = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {INVALID_JSON: arguments}


def ending(finish_reason: OpenAIFinish, stop_string: str | None, *, has_calls: bool) -> dict[str, Any]:
    """`stop_reason` and `stop_sequence`. `stop_string` is the string that ended the text, if one did."""
    if finish_reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if stop_string is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": stop_string}
    return {"stop_reason": "tool_use" if has_calls else "end_turn", "stop_sequence": None}


def usage_value(usage: RunUsage) -> dict[str, Any]:
    """`usage`: here the cached tokens are not part of `input_tokens`."""
    return {
        **prompt_usage(usage),
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }


def prompt_usage(usage: RunUsage) -> dict[str, Any]:
    """`usage` before the first token of the answer."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": 0,
    }


def new_call_id() -> str:
    """An id for a call, unless the model gave one."""
    return new_id("toolu_")


def new_signature() -> str:
    """Clients send the signature of a thinking block back. This server accepts any, and clients may demand one."""
    return new_id("sig_")
