"""The response object without its items: the fields of the request, the status, and the usage."""

from __future__ import annotations

import time
from typing import Any

from ipc.sampling_params import SamplingParams
from pipeline.http.generation.chat_run import RunUsage
from pipeline.http.openai.responses.body import ResponseBody, TextOptions


def response_in_progress(response_id: str, model: str, body: ResponseBody, params: SamplingParams) -> dict[str, Any]:
    """The response before its end. Fields that the request left out have the values that the engine uses."""
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": params.temperature,
        "text": _text_value(body.text),
        "tool_choice": body.tool_choice or "auto",
        "tools": _tools_value(body),
        "top_logprobs": body.top_logprobs or 0,
        "top_p": params.top_p,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "truncation": body.truncation or "disabled",
        "usage": None,
        "user": body.user,
        "metadata": body.metadata or {},
    }


def usage_value(usage: RunUsage) -> dict[str, Any]:
    """`usage` of a response that has ended."""
    return {
        "input_tokens": usage.prompt_tokens,
        # The engine does not count the tokens that it adds to the prefix cache.
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _tools_value(body: ResponseBody) -> list[dict[str, Any]]:
    return [
        {"description": None, "parameters": None, **tool, "strict": bool(tool.get("strict"))}
        for tool in body.tools or []
    ]


def _text_value(text: TextOptions | None) -> dict[str, Any]:
    format = (text.format if text is not None else None) or {"type": "text"}
    if format["type"] == "json_schema":
        format = {"description": None, **format, "strict": bool(format.get("strict"))}
    return {"format": format} | ({} if text is None or text.verbosity is None else {"verbosity": text.verbosity})
