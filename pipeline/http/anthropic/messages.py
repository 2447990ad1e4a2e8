"""`/v1/messages` and `/v1/messages/count_tokens` of Anthropic's API."""

from __future__ import annotations

from pipeline.http.anthropic.answer import content_blocks, ending, message_value, usage_value
from pipeline.http.anthropic.body import (
    HARMLESS,
    NEUTRAL,
    MessagesBody,
    PromptBody,
    chat_request,
    message_request,
)
from pipeline.http.anthropic.message_events import EventWriter
from pipeline.http.bodies import read_body
from pipeline.http.generation.chat_request import chat_of, make_run
from pipeline.http.generation.chat_run import StreamReader, whole_answer
from pipeline.http.service import new_id
from pipeline.http.transport import Call, EventStream, Reply


async def create(call: Call) -> Reply | EventStream:
    """Answer a chat with a message, whole or as a stream of events."""
    body = read_body(call.body, MessagesBody, harmless=HARMLESS, neutral=NEUTRAL)
    service = call.service
    model = service.check_model(body.model)
    run = await make_run(service, message_request(body, service, call.headers, new_id("msg_")))
    shows_thinking = body.thinking is None or body.thinking.display != "omitted"
    if body.stream:
        reader = StreamReader(service, run)
        writer = EventWriter(run.request_id, model, shows_thinking=shows_thinking)
        return EventStream(reader.start(), lambda output: writer.write(reader.read(output)))
    (answer,), usage = await whole_answer(service, run)
    end = ending(answer.finish_reason, answer.stop_reason, has_calls=bool(answer.tool_calls))
    content = content_blocks(answer, shows_thinking=shows_thinking)
    return Reply(message_value(run.request_id, model, content, end, usage_value(usage)))


async def count_tokens(call: Call) -> Reply:
    """The number of tokens of a prompt, as the engine renders it."""
    body = read_body(call.body, PromptBody, harmless=HARMLESS, neutral=NEUTRAL)
    call.service.check_model(body.model)
    prompt = await call.service.client.tokenize(chat_of(call.service, chat_request(body)))
    return Reply({"input_tokens": len(prompt.token_ids)})
