"""A chat as an API received it, made into a run: its prompt, its grammar, and how its answer is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from ipc.sampling_params import SamplingParams
from ipc.scheduling_params import DEFAULT_SCHEDULING, SchedulingParams
from pipeline.client.chat_input import Chat
from pipeline.http.generation.chat_run import ChatRun
from pipeline.http.generation.tool_choice import constrain, messages_for
from pipeline.http.service import Service


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """What all chat APIs can ask, in the terms of OpenAI's chat completions.

    Args:
        messages: as `Chat` takes them.
        tools: {"type": "function", "function": {...}} each.
        tool_choice: "auto", "none", "required", or an object that names a function.
        response_format: {"type": "json_schema", ...} and the like.
        structured_outputs: the fields of StructuredOutputs.
        reasoning_effort: for the template; "none" asks it to leave the reasoning out.
    """

    messages: list[dict[str, Any]]
    params: SamplingParams
    request_id: str
    tools: list[dict[str, Any]] = field(default_factory=list)
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    cache_salt: str = ""
    scheduling: SchedulingParams = DEFAULT_SCHEDULING


def chat_of(service: Service, request: ChatRequest) -> Chat:
    """The chat whose rendering is the prompt of a request. Raises InvalidRequest."""
    tools = [] if request.tool_choice == "none" else request.tools
    return Chat(
        messages_for(request.messages, tools, service.template_reads_tools),
        tools=tools if tools and service.template_reads_tools else None,
        documents=request.documents,
        chat_template=request.chat_template,
        chat_template_kwargs=_template_kwargs(request),
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
    )


async def make_run(service: Service, request: ChatRequest) -> ChatRun:
    """Raises InvalidRequest for a request that contradicts itself, and what `AsyncClient.tokenize` raises."""
    chat = chat_of(service, request)
    starts_in_reasoning = await service.reasoning_start.is_inside(chat)
    constraint = constrain(
        tools=request.tools,
        tool_choice=request.tool_choice,
        parallel_tool_calls=request.parallel_tool_calls,
        response_format=request.response_format,
        structured_outputs=request.structured_outputs,
        format=service.format,
        starts_in_reasoning=starts_in_reasoning,
    )
    params = request.params
    if constraint.structured is not None:
        params = msgspec.structs.replace(params, structured_outputs=constraint.structured)
    return ChatRun(
        chat=chat,
        params=params,
        request_id=request.request_id,
        call_form=constraint.call_form,
        tools=constraint.tools,
        starts_in_reasoning=starts_in_reasoning,
        cache_salt=request.cache_salt,
        scheduling=request.scheduling,
    )


def _template_kwargs(request: ChatRequest) -> dict[str, Any] | None:
    """The template's further variables. Templates call the switch of reasoning `enable_thinking` or `thinking`."""
    effort = request.reasoning_effort
    if effort is None:
        return request.chat_template_kwargs
    added: dict[str, Any] = {"reasoning_effort": effort}
    if effort == "none":
        added |= {"enable_thinking": False, "thinking": False}
    return added | (request.chat_template_kwargs or {})
