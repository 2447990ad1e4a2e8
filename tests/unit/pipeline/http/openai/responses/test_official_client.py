"""The official `openai` package reads what the server writes: responses, streams, parsed answers, loops of tools."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from ipc.errors import EngineUnavailable
from tests.unit.pipeline.http.application import use_client
from tests.unit.pipeline.http.fake_engine import THINKING
from tests.unit.pipeline.http.openai.responses.responses_api import ResponsesApi
from tests.unit.pipeline.http.openai.responses.test_create import ADD, CALL

pytestmark = pytest.mark.slow  # the package takes a second to import

T = TypeVar("T")
TURN = ("<think>", "H", "m", "</think>", "So: ", CALL[:20], CALL[20:])
_event: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)


class City(pydantic.BaseModel):
    name: str


def run(server: ResponsesApi, use: Callable[[openai.AsyncOpenAI], Awaitable[T]]) -> T:
    return use_client(server.app, partial(openai.AsyncOpenAI, base_url="http://server/v1"), use)


@pytest.fixture
def server() -> ResponsesApi:
    return ResponsesApi(THINKING)


def test_responses_and_all_events_are_valid_for_the_official_types(server: ResponsesApi) -> None:
    Response.model_validate(server.create(*TURN, tools=[ADD]), strict=True)
    for event in server.stream(*TURN, tools=[ADD]):
        _event.validate_python(event, strict=True)
    for event in server.stream("a", finish_reason="length", include=["message.output_text.logprobs"]):
        _event.validate_python(event, strict=True)


def test_the_streaming_helper_accumulates_the_response(server: ResponsesApi) -> None:
    server.engine.script(*TURN)

    async def use(client: openai.AsyncOpenAI) -> tuple[list[str], Any]:
        tools: Any = [{**ADD, "strict": True}]
        async with client.responses.stream(model="m", input="1+1?", tools=tools) as stream:
            types = [event.type async for event in stream]
            return types, await stream.get_final_response()

    types, response = run(server, use)
    assert types.count("response.reasoning_text.delta") == 2
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
    assert response.output[2].parsed_arguments == {"a": 1}
    assert response.output_text == "So: "


def test_an_answer_is_parsed_into_a_model(server: ResponsesApi) -> None:
    server.engine.script('{"name": ', '"Rio"}')
    response = run(server, lambda client: client.responses.parse(model="m", input="Where?", text_format=City))
    assert response.output_parsed == City(name="Rio")
    structured = server.params.structured_outputs
    assert structured is not None
    assert "name" in json.loads(str(structured.json))["properties"]


def test_a_loop_of_tools_goes_on_by_items_or_by_the_last_response(server: ResponsesApi) -> None:
    tools: Any = [ADD]

    async def use(client: openai.AsyncOpenAI) -> None:
        first = await client.responses.create(model="m", input="1+1?", tools=tools)
        call: Any = first.output[-1]
        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "2"}
        items: Any = [{"role": "user", "content": "1+1?"}, *first.output, result]
        by_items = await client.responses.create(model="m", input=items, tools=tools)
        items_messages = server.messages
        by_id = await client.responses.create(model="m", input=[result], tools=tools, previous_response_id=first.id)
        assert items_messages == server.messages
        assert by_items.output_text == by_id.output_text == "Two."

    server.engine.script(*TURN)
    server.engine.script("Two.")
    server.engine.script("Two.")
    run(server, use)


def test_stored_responses_are_read_listed_and_deleted(server: ResponsesApi) -> None:
    server.engine.script("One")

    async def use(client: openai.AsyncOpenAI) -> None:
        created = await client.responses.create(model="m", input="Begin", metadata={"a": "b"})
        assert await client.responses.retrieve(created.id) == created
        items = [item async for item in client.responses.input_items.list(created.id, limit=1)]
        assert len(items) == 1
        with pytest.raises(openai.BadRequestError, match="background"):
            await client.responses.cancel(created.id)
        await client.responses.delete(created.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(created.id)
        with pytest.raises(openai.NotFoundError) as caught:
            await client.responses.create(model="m", input="x", previous_response_id=created.id)
        assert caught.value.code == "previous_response_not_found"
        count = await client.responses.input_tokens.count(model="m", input="Hi")
        assert count.input_tokens > 0

    run(server, use)


def test_a_stream_that_fails_raises_the_clients_exception(server: ResponsesApi) -> None:
    server.engine.script("Hel", EngineUnavailable("the engine has ended"))

    types: list[str] = []

    async def use(client: openai.AsyncOpenAI) -> None:
        async for event in await client.responses.create(model="m", input="x", stream=True):
            types.append(event.type)

    with pytest.raises(openai.APIError, match="the engine has ended"):
        run(server, use)
    assert types[-1] == "response.failed"
