"""`/v1/chat/completions`: a chat in, a message out, whole or as a stream of chunks."""

from __future__ import annotations

import time
from typing import Any, Final

from pipeline.client.outputs import Output
from pipeline.http.bodies import read_body
from pipeline.http.body_schemas import ChatMessages, FunctionTools
from pipeline.http.errors import HttpError
from pipeline.http.generation.chat_request import ChatRequest, make_run
from pipeline.http.generation.chat_run import Answer, ChatRun, StreamReader, whole_answer
from pipeline.http.generation.sampling_fields import (
    MAX_TOP_LOGPROBS,
    CompletionFields,
    answer_id,
    max_prompt_tokens,
    sampling_params,
    scheduling_params,
    structured_fields,
)
from pipeline.http.openai.chat_chunks import ChunkWriter
from pipeline.http.openai.wire import (
    DONE,
    StreamOptions,
    chat_logprobs,
    check_prompt_logprobs,
    check_stream_options,
    prompt_logprobs_value,
    usage_value,
)
from pipeline.http.service import Service, new_id
from pipeline.http.transport import Call, EventStream, Reply

_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "audio": (), "functions": ([],), "function_call": ("none", "auto"), "modalities": (["text"],),
    "web_search_options": (), "echo": (False,), "best_of": (1,), "use_beam_search": (False,), "length_penalty": (1.0,),
    "mm_processor_kwargs": ({},), "kv_transfer_params": (),
}  # fmt: skip
_HARMLESS: Final = ("include_reasoning", "moderation")


class ChatCompletionBody(CompletionFields, kw_only=True):
    """The body of a request. Names and meanings are those of OpenAI's API, and of vLLM's additions to it."""

    messages: ChatMessages
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: FunctionTools | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_ids: bool | None = None


async def create(call: Call) -> Reply | EventStream:
    """Answer a chat."""
    body = read_body(call.body, ChatCompletionBody, harmless=_HARMLESS, neutral=_NEUTRAL)
    service = call.service
    model = service.check_model(body.model)
    run = await make_run(service, _chat_request(call, body))
    head = {
        "id": answer_id("chatcmpl-", body), "object": "chat.completion", "created": int(time.time()),
        "model": model,
    }  # fmt: skip
    role = _role(body)
    prompt_token_ids = await _prompt_token_ids(service, run) if body.return_token_ids else None
    if not body.stream:
        answers, usage = await whole_answer(service, run)
        value = {**head, "choices": [_choice(answer, role, body) for answer in answers], "usage": usage_value(usage)}
        value["system_fingerprint"] = None
        rows = answers[0].prompt_logprobs
        if rows is not None and body.prompt_logprobs is not None:
            value["prompt_logprobs"] = prompt_logprobs_value(rows, body.prompt_logprobs)
        if prompt_token_ids is not None:
            value["prompt_token_ids"] = prompt_token_ids
        return Reply(value)
    options = body.stream_options or StreamOptions()
    writer = ChunkWriter(
        head | {"object": "chat.completion.chunk"}, reports_usage=options.include_usage,
        prompt_token_ids=prompt_token_ids, role=role, tokens_as_ids=bool(body.return_tokens_as_token_ids),
    )  # fmt: skip
    reader = StreamReader(service, run)

    def write(output: Output) -> bytes:
        part = reader.read(output)
        if options.continuous_usage_stats:
            writer.count(part)
        event = writer.write(part)
        if part.usage is None:
            return event
        if options.include_usage:
            event += writer.write_usage(usage_value(part.usage))
        return event + DONE

    return EventStream(reader.start(), write)


async def _prompt_token_ids(service: Service, run: ChatRun) -> list[int]:
    """The tokens of the prompt, as the engine gets them. Raises as `AsyncClient.tokenize` does."""
    ids = (await service.client.tokenize(run.chat)).token_ids
    return ids[-(max_prompt_tokens(run.params, service.max_model_len) or 0) :]


def _chat_request(call: Call, body: ChatCompletionBody) -> ChatRequest:
    if body.top_logprobs is not None and not body.logprobs:
        raise HttpError(400, "top_logprobs is given without logprobs: set logprobs to true", param="top_logprobs")
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= MAX_TOP_LOGPROBS:
        raise HttpError(
            400, f"top_logprobs ({body.top_logprobs}) must lie in [0, {MAX_TOP_LOGPROBS}]", param="top_logprobs"
        )
    check_prompt_logprobs(body.prompt_logprobs, is_stream=bool(body.stream))
    check_stream_options(body.stream_options, is_stream=bool(body.stream))
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    params = sampling_params(
        body, call.service.defaults, max_tokens=max_tokens, logprobs=(body.top_logprobs or 0) if body.logprobs else None
    )
    return ChatRequest(
        messages=body.messages,
        params=params,
        request_id=new_id("chatcmpl-"),
        tools=body.tools or [],
        tool_choice=body.tool_choice,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        response_format=body.response_format,
        structured_outputs=structured_fields(body),
        reasoning_effort=body.reasoning_effort,
        documents=body.documents,
        chat_template=body.chat_template,
        chat_template_kwargs=body.chat_template_kwargs,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=bool(body.continue_final_message),
        cache_salt=body.cache_salt or "",
        scheduling=scheduling_params(body, call.headers, call.service),
    )


def _role(body: ChatCompletionBody) -> str:
    """The role of the answer: that of the message which it continues, as in vLLM."""
    if body.continue_final_message and body.messages:
        role = body.messages[-1].get("role")
        return role if isinstance(role, str) else "assistant"
    return "assistant"


def _choice(answer: Answer, role: str, body: ChatCompletionBody) -> dict[str, Any]:
    message: dict[str, Any] = {"role": role, "content": answer.content, "refusal": None, "annotations": []}
    if answer.reasoning is not None:
        message["reasoning_content"] = message["reasoning"] = answer.reasoning
    if answer.tool_calls:
        message["tool_calls"] = [
            {
                "id": each.call_id or new_id("call_"),
                "type": "function",
                "function": {"name": each.name, "arguments": each.arguments},
            }
            for each in answer.tool_calls
        ]
    logprobs = None
    if answer.logprobs is not None:
        logprobs = chat_logprobs(answer.logprobs, as_ids=bool(body.return_tokens_as_token_ids))
    choice = {
        "index": answer.index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
    }
    if body.return_token_ids:
        choice["token_ids"] = answer.token_ids
    return choice
