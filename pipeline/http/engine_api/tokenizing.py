"""`/tokenize` and `/detokenize`, as vLLM has them: the engine's tokenizer, without generating."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from ipc.sampling_params import SamplingParams
from pipeline.client.chat_input import Chat
from pipeline.http.bodies import read_body
from pipeline.http.body_schemas import ChatMessages, FunctionTools
from pipeline.http.errors import HttpError
from pipeline.http.generation.chat_request import ChatRequest, chat_of
from pipeline.http.service import Service
from pipeline.http.transport import Call, Reply

_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {"mm_processor_kwargs": ({},)}
_OF_CHATS: Final = (
    "add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs", "tools",
)  # fmt: skip


class TokenizeBody(msgspec.Struct, kw_only=True):
    """Either a prompt or the messages of a chat. Names and meanings are vLLM's."""

    model: str | None = None
    prompt: str | None = None
    messages: ChatMessages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: FunctionTools | None = None


class DetokenizeBody(msgspec.Struct, kw_only=True):
    """Token ids. Their text has the names of special tokens."""

    tokens: list[int]
    model: str | None = None


async def tokenize(call: Call) -> Reply:
    """The tokens of a prompt, as the model would get them. `token_strs` are their texts."""
    body = read_body(call.body, TokenizeBody, neutral=_NEUTRAL)
    service = call.service
    service.check_model(body.model)
    found = await service.client.tokenize(
        _prompt(service, body), add_special_tokens=body.add_special_tokens is not False
    )
    num_tokens, most = len(found.token_ids), service.config.max_body_values
    if num_tokens > most:  # the process would serve nobody else while it writes them
        raise HttpError(
            400,
            f"the prompt has {num_tokens:,} tokens, and an answer holds at most {most:,}: send the prompt in parts, or "
            "raise http.max_body_values of the server",
            param="prompt" if body.messages is None else "messages",
        )
    texts = None
    if body.return_token_strs:
        text_of = {each: each.decode("utf-8", "replace") for each in set(found.token_bytes)}
        texts = [text_of[each] for each in found.token_bytes]
    return Reply({
        "count": num_tokens, "max_model_len": service.max_model_len, "tokens": found.token_ids,
        "token_strs": texts,
    })  # fmt: skip


async def detokenize(call: Call) -> Reply:
    """The text of tokens."""
    body = read_body(call.body, DetokenizeBody)
    call.service.check_model(body.model)
    return Reply({"prompt": await call.service.client.detokenize(body.tokens)})


def _prompt(service: Service, body: TokenizeBody) -> str | Chat:
    if (body.prompt is None) == (body.messages is None):
        given = "neither is" if body.prompt is None else "both are"
        raise HttpError(400, f"prompt or messages: {given} given; give one of them", param="prompt")
    if body.messages is not None:
        if body.add_special_tokens:
            raise HttpError(
                400,
                "add_special_tokens is for a prompt; the chat template of messages writes these tokens: leave it out",
                param="add_special_tokens",
            )
        return chat_of(service, _chat_request(body, body.messages))
    assert body.prompt is not None, "one of the two is given"
    for name in _OF_CHATS:
        if getattr(body, name):
            raise HttpError(400, f"{name} is for messages, and the request has a prompt: leave it out", param=name)
    return body.prompt


def _chat_request(body: TokenizeBody, messages: list[dict[str, Any]]) -> ChatRequest:
    return ChatRequest(
        messages=messages,
        params=SamplingParams(),
        request_id="",
        tools=body.tools or [],
        chat_template=body.chat_template,
        chat_template_kwargs=body.chat_template_kwargs,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=bool(body.continue_final_message),
    )
