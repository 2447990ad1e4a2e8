"""The bodies of `/v1/messages` and `/v1/messages/count_tokens`, and the requests that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec

from ipc.sampling_params import SamplingParams
from pipeline.http.anthropic.conversation import chat_messages, continues_answer
from pipeline.http.anthropic.tools import ToolChoiceBody, function_tools
from pipeline.http.body_schemas import AnthropicMessages, AnthropicTools
from pipeline.http.errors import HttpError
from pipeline.http.generation.chat_request import ChatRequest
from pipeline.http.generation.sampling_fields import SamplingFields, sampling_params, scheduling_params
from pipeline.http.service import Service

MAX_TEMPERATURE: Final = 1.0  # Anthropic's bound
# Fields about billing, speed, other models and edits of long conversations: this server has one answer to a prompt.
HARMLESS: Final = (
    "billing_policy", "context_management", "diagnostics", "fallback_credit_token", "fallbacks", "speed",
    "user_profile_id", "workspace_id",
)  # fmt: skip
NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {"mcp_servers": ([],), "compaction": (), "thread": ()}
_NO_PARAMS: Final = SamplingParams()
_EFFORTS: Final = {"xhigh": "high", "max": "high"}  # chat templates know low, medium and high


class ThinkingBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Whether the model thinks before it answers. `display` "omitted" leaves the text of the thinking out."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted"] | None = None


class JsonFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The JSON schema that the answer follows."""

    type: Literal["json_schema"]
    schema: dict[str, Any]
    name: str | None = None


class OutputConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Effort and format of the answer."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonFormat | None = None


class PromptBody(msgspec.Struct, kw_only=True):
    """The fields that make the prompt: the body of `/v1/messages/count_tokens`.

    `chat_template_kwargs` is vLLM's addition.
    """

    messages: AnthropicMessages
    model: str | None = None
    system: str | list[Any] | None = None
    tools: AnthropicTools | None = None
    tool_choice: ToolChoiceBody | None = None
    thinking: ThinkingBody | None = None
    output_config: OutputConfig | None = None
    output_format: JsonFormat | None = None  # where `output_config.format` was in earlier versions of the API
    chat_template_kwargs: dict[str, Any] | None = None


class MessagesBody(PromptBody, kw_only=True):
    """The body of `/v1/messages`. The fields from `cache_salt` on are additions, as in chat completions."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    cache_salt: str | None = None
    priority: int | None = None
    deadline_s: float | None = None
    queue_timeout_s: float | None = None
    tenant: str | None = None


def chat_request(
    body: PromptBody, *, params: SamplingParams = _NO_PARAMS, request_id: str = "", **rest: Any
) -> ChatRequest:
    """The request in the terms of chat completions. Raises HttpError 400, and InvalidRequest."""
    choice = body.tool_choice
    config = body.output_config or OutputConfig()
    format = config.format or body.output_format
    messages = chat_messages(body.system, body.messages)
    return ChatRequest(
        messages=messages,
        params=params,
        request_id=request_id,
        tools=function_tools(body.tools),
        tool_choice=None if choice is None else choice.value,
        parallel_tool_calls=choice is None or not choice.disable_parallel_tool_use,
        response_format=None if format is None else _response_format(format),
        reasoning_effort=_effort(body.thinking, config),
        chat_template_kwargs=_template_kwargs(body),
        continue_final_message=continues_answer(body.messages),
        **rest,
    )


def message_request(body: MessagesBody, service: Service, headers: Mapping[str, str], request_id: str) -> ChatRequest:
    """The request of `/v1/messages`. Raises as `chat_request` does."""
    if body.temperature is not None and not 0 <= body.temperature <= MAX_TEMPERATURE:
        raise HttpError(
            400, f"temperature ({body.temperature}) must lie in [0, {MAX_TEMPERATURE:g}]", param="temperature"
        )
    fields = SamplingFields(
        stop=body.stop_sequences, temperature=body.temperature, top_p=body.top_p,
        top_k=body.top_k, priority=body.priority, deadline_s=body.deadline_s, queue_timeout_s=body.queue_timeout_s,
        tenant=body.tenant,
    )  # fmt: skip
    has_thinking_tokens = service.format.reasoning_end_id is not None
    budget = _budget(body.thinking) if has_thinking_tokens else None
    params = sampling_params(fields, service.defaults, max_tokens=body.max_tokens, thinking_token_budget=budget)
    return chat_request(
        body,
        params=params,
        request_id=request_id,
        cache_salt=body.cache_salt or "",
        scheduling=scheduling_params(fields, headers, service),
    )


def _budget(thinking: ThinkingBody | None) -> int | None:
    if thinking is None or thinking.type != "enabled" or thinking.budget_tokens is None:
        return None
    if thinking.budget_tokens < 1:
        raise HttpError(
            400, f"thinking.budget_tokens ({thinking.budget_tokens}) must be at least 1", param="thinking.budget_tokens"
        )
    return thinking.budget_tokens


def _effort(thinking: ThinkingBody | None, config: OutputConfig) -> str | None:
    if thinking is not None and thinking.type == "disabled":
        return "none"
    return None if config.effort is None else _EFFORTS.get(config.effort, config.effort)


def _template_kwargs(body: PromptBody) -> dict[str, Any] | None:
    """The template's further variables. Templates call the switch of reasoning `enable_thinking` or `thinking`."""
    if body.thinking is None or body.thinking.type != "enabled":
        return body.chat_template_kwargs
    return {"enable_thinking": True, "thinking": True} | (body.chat_template_kwargs or {})


def _response_format(format: JsonFormat) -> dict[str, Any]:
    schema = {"name": format.name or "answer", "schema": format.schema, "strict": True}
    return {"type": "json_schema", "json_schema": schema}
