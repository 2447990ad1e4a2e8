"""`POST /v1/responses`: the next turn of a conversation, whole or as a stream of events."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from ipc.errors import InvalidRequest
from pipeline.http.generation.chat_request import ChatRequest, make_run
from pipeline.http.generation.chat_run import Answer, ChatRun, RunUsage, stream_parts, whole_answer
from pipeline.http.generation.events import Content, Event, Reasoning, ToolArguments, ToolCallBegin
from pipeline.http.generation.sampling_fields import sampling_params, scheduling_params, structured_fields
from pipeline.http.openai.responses.body import (
    ResponseBody,
    chat_tools,
    read_response_body,
    response_format,
)
from pipeline.http.openai.responses.chat_messages import chat_messages
from pipeline.http.openai.responses.events import EventWriter
from pipeline.http.openai.responses.input_items import Item, read_items
from pipeline.http.openai.responses.output_items import Output
from pipeline.http.openai.responses.response_object import response_in_progress, usage_value
from pipeline.http.openai.responses.store import (
    PREFIX,
    Conversation,
    KeptResponse,
    keep_response,
    recall_conversation,
    resolve_references,
)
from pipeline.http.service import Service, new_id
from pipeline.http.transport import Call, EventStream, Reply, as_http_error

# Fields of chat completions, and their names here.
_PLACES: Final = (
    ("].function", "]"), ("tool_choice.function", "tool_choice"), ("tool_choice.allowed_tools", "tool_choice"),
    ("response_format.json_schema", "text.format"), ("response_format", "text.format"),
    ("max_tokens", "max_output_tokens"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One request for a response.

    Args:
        conversation: the turns before it.
        input_items: of this request, without references.
        run: on the engine.
    """

    body: ResponseBody
    response_id: str
    conversation: Conversation
    input_items: list[Item]
    run: ChatRun


async def create(call: Call) -> Reply | EventStream:
    """Answer a turn of a conversation."""
    turn = await make_turn(call, read_response_body(call.body))
    response = response_in_progress(
        turn.response_id, call.service.check_model(turn.body.model), turn.body, turn.run.params
    )
    if turn.body.stream:
        return EventStream(_events(call, turn, response))
    output = Output(turn.response_id.removeprefix(PREFIX))
    with _own_names():
        if turn.body.with_logprobs:  # only a stream tells which part of the text a token belongs to
            async for part in stream_parts(call.service, turn.run):
                output.add(part.events, part.logprobs)
                reason, usage = part.finish_reason, part.usage
        else:
            (answer,), usage = await whole_answer(call.service, turn.run)
            output.add(_events_of(answer), None)
            reason = answer.finish_reason
    status = _status(reason)
    output.finish(status)
    return Reply(await _finished(call.service, turn, response, output, status, usage))


async def make_turn(call: Call, body: ResponseBody) -> Turn:
    """Check a request and prepare its run. Raises HttpError, and what `make_run` raises."""
    service = call.service
    service.check_model(body.model)
    response_id = new_id(PREFIX)
    items = read_items(body.input, response_id.removeprefix(PREFIX))
    conversation = await recall_conversation(service, body.previous_response_id)
    items = await resolve_references(service, items, conversation)
    messages = chat_messages(body.instructions, [*conversation.items, *items])
    with _own_names():
        run = await make_run(service, _chat_request(call, body, messages, response_id))
    return Turn(body=body, response_id=response_id, conversation=conversation, input_items=items, run=run)


def _chat_request(call: Call, body: ResponseBody, messages: list[dict[str, Any]], response_id: str) -> ChatRequest:
    params = sampling_params(
        body, call.service.defaults, max_tokens=body.max_output_tokens,
        logprobs=(body.top_logprobs or 0) if body.with_logprobs else None,
        truncate_prompt_tokens=-1 if body.truncation == "auto" else None,
    )  # fmt: skip
    return ChatRequest(
        messages=messages,
        params=params,
        request_id=response_id,
        tools=chat_tools(body.tools),
        tool_choice=body.tool_choice,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        response_format=response_format(body.text),
        structured_outputs=structured_fields(body),
        reasoning_effort=None if body.reasoning is None else body.reasoning.effort,
        chat_template=body.chat_template,
        chat_template_kwargs=body.chat_template_kwargs,
        cache_salt=body.cache_salt or "",
        scheduling=scheduling_params(body, call.headers, call.service),
    )


async def _events(call: Call, turn: Turn, response: dict[str, Any]) -> AsyncGenerator[bytes]:
    writer, output = EventWriter(), Output(turn.response_id.removeprefix(PREFIX))
    begin = writer.begin(response)  # waits for the first part, because an earlier error has its own status
    try:
        with _own_names():
            async for part in stream_parts(call.service, turn.run):
                changes = output.add(part.events, part.logprobs)
                if part.finish_reason is None and (events := begin + writer.write(changes)):
                    begin = b""
                    yield events
        status = _status(part.finish_reason)
        events = begin + writer.write([*changes, *output.finish(status)])
        yield events + writer.end(await _finished(call.service, turn, response, output, status, part.usage))
    except Exception as error:
        if begin:
            raise
        failure = as_http_error(error, call)
        output.finish("incomplete")
        code = {429: "rate_limit_exceeded", 400: "invalid_prompt"}.get(failure.status, "server_error")
        failed = {"status": "failed", "error": {"code": code, "message": failure.message}, "output": output.value()}
        yield writer.fail(response | failed, failure)


@contextlib.contextmanager
def _own_names() -> Iterator[None]:
    """Errors of the engine name fields of chat completions. Here they get the names that this API has."""
    try:
        yield
    except InvalidRequest as error:
        message = str(error)
        for theirs, ours in _PLACES:
            message = message.replace(theirs, ours)
        raise InvalidRequest(message) from None


async def _finished(
    service: Service, turn: Turn, response: dict[str, Any], output: Output, status: str, usage: RunUsage | None
) -> dict[str, Any]:
    """The response that has ended. The gateway has kept it by then, so that the client can continue it at once."""
    assert usage is not None, "an answer that has ended has its usage"
    finished = response | {
        "status": status,
        "completed_at": int(time.time()) if status == "completed" else None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "output": output.value(),
        "usage": usage_value(usage),
    }
    if finished["store"]:
        kept = KeptResponse(
            response=msgspec.json.encode(finished), input_items=turn.input_items, ancestors=turn.conversation.ancestors
        )
        finished["store"] = await keep_response(service, turn.response_id, kept)
    return finished


def _status(finish_reason: str | None) -> Any:
    return "incomplete" if finish_reason == "length" else "completed"


def _events_of(answer: Answer) -> Sequence[Event]:
    events: list[Event] = []
    if answer.reasoning:
        events.append(Reasoning(answer.reasoning))
    if answer.content:
        events.append(Content(answer.content))
    for each in answer.tool_calls:
        events += [ToolCallBegin(each.name, each.call_id), ToolArguments(each.arguments)]
    return events
