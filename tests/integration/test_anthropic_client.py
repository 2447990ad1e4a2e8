"""Anthropic's own Python package against the server: in front of a running engine, and of one whose answers are written
here, because the small model neither thinks nor calls tools by itself."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any, Literal

import anthropic
import httpx2
import pydantic
import pytest

from ipc.errors import EngineUnavailable, QueueFull
from pipeline import Pipeline
from tests.integration.conftest import TINY_CONFIG
from tests.integration.weather_calls import CALL_RIO, MESSAGES, WEATHER_NAME, WEATHER_SCHEMA, use_written_engine
from tests.unit.pipeline.http.fake_engine import FakeEngine, ids_of

pytestmark = pytest.mark.slow

GREEDY = {"temperature": 0}
WEATHER: Any = {**WEATHER_NAME, "input_schema": WEATHER_SCHEMA}
ANSWER = ["<think>Hm", "m</think>", "Look: ", CALL_RIO[:38], CALL_RIO[38:-12], CALL_RIO[-12:]]


class Weather(pydantic.BaseModel):
    """A format of answers."""

    city: Literal["Rio", "Bonn"]
    is_fine: bool


@pytest.fixture(scope="module")
def client() -> Iterator[anthropic.Anthropic]:
    overrides = [
        "scheduler.max_model_len=1024",
        "http.served_model_names=['small']",
    ]
    with Pipeline(TINY_CONFIG, overrides) as pipeline:
        yield anthropic.Anthropic(base_url=pipeline.http_url, api_key="any", max_retries=0)


def test_a_message_and_its_stream_say_the_same(client: anthropic.Anthropic) -> None:
    request: Any = {
        "model": "small",
        "max_tokens": 12,
        "messages": MESSAGES,
        "extra_body": GREEDY,
        "system": "Be brief.",
    }
    message = client.messages.create(**request)
    assert (message.type, message.role, message.model, message.stop_reason) == (
        "message",
        "assistant",
        "small",
        "max_tokens",
    )
    assert message._request_id
    [block] = message.content
    assert block.type == "text"
    usage = message.usage
    assert usage.output_tokens == 12
    with client.messages.stream(**request) as stream:
        events = list(stream)
        streamed = stream.get_final_message()
    assert "".join(event.text for event in events if event.type == "text") == block.text
    assert [(each.type, getattr(each, "text", None)) for each in streamed.content] == [("text", block.text)]
    assert (streamed.stop_reason, streamed.usage.output_tokens) == ("max_tokens", 12)
    size = client.messages.count_tokens(model="small", messages=MESSAGES, system="Be brief.").input_tokens
    for each in (usage, streamed.usage, events[0].message.usage):
        assert each.input_tokens + (each.cache_read_input_tokens or 0) == size
    last = [event for event in events if event.type == "message_delta"]
    assert [event.usage.output_tokens for event in last] == [12]


def test_a_stop_sequence_is_named_and_an_answer_is_continued_behind_its_beginning(client: anthropic.Anthropic) -> None:
    request: Any = {"model": "small", "max_tokens": 24, "messages": MESSAGES, "extra_body": GREEDY}
    text = "".join(block.text for block in client.messages.create(**request).content if block.type == "text")
    stop = text[4:7]
    message = client.messages.create(**request, stop_sequences=["never said", stop])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    begun = [*MESSAGES, {"role": "assistant", "content": "The weather in"}]
    more = client.messages.create(**{**request, "messages": begun})
    assert [block.type for block in more.content] == ["text"]
    assert not more.content[0].text.startswith("The weather in")
    counted = client.messages.count_tokens(model="small", messages=begun).input_tokens
    assert counted == more.usage.input_tokens + (more.usage.cache_read_input_tokens or 0)


def test_a_call_that_the_request_demands_is_valid_and_its_result_can_be_sent_back(client: anthropic.Anthropic) -> None:
    request: Any = {"model": "small", "max_tokens": 128, "tools": [WEATHER], "messages": MESSAGES}
    for choice in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "get_weather"}):
        with client.messages.stream(**request, tool_choice=choice) as stream:
            message = stream.get_final_message()
        [call] = message.content
        assert call.type == "tool_use"
        assert (call.name, message.stop_reason) == ("get_weather", "tool_use")
        city, days = call.input["city"], call.input["days"]
        assert isinstance(city, str)
        assert isinstance(days, int)
    answered = [
        *MESSAGES,
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "Rain."}]},
    ]
    assert client.messages.create(**{**request, "messages": answered}).usage.output_tokens > 0


def test_an_answer_has_the_format_that_the_client_parses(client: anthropic.Anthropic) -> None:
    message = client.messages.parse(model="small", max_tokens=128, messages=MESSAGES, output_format=Weather)
    assert isinstance(message.parsed_output, Weather)


def test_errors_are_of_the_clients_classes(client: anthropic.Anthropic) -> None:
    request: Any = {"model": "small", "max_tokens": 4, "messages": MESSAGES}
    image = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/a.png"}}
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\]\.content\[0\] is a block of type image"):
        client.messages.create(**request | {"messages": [{"role": "user", "content": [image]}]})
    with pytest.raises(anthropic.NotFoundError, match="is not served here"):
        client.messages.create(**request | {"model": "claude"})
    with pytest.raises(anthropic.BadRequestError, match="max_tokens") as raised:
        client.messages.create(**request | {"max_tokens": 5_000}, stream=True)
    assert raised.value.request_id


def test_the_tokens_of_a_text_become_the_same_text_again(client: anthropic.Anthropic) -> None:
    text = "Größe: 3 µm\n"
    tokens = httpx2.post(f"{client.base_url}/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert (tokens["count"], tokens["max_model_len"]) == (len(tokens["tokens"]), 1024)
    assert len(tokens["token_strs"]) == tokens["count"] > 3
    assert httpx2.post(f"{client.base_url}/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": text}
    chat = httpx2.post(f"{client.base_url}/tokenize", json={"messages": MESSAGES}).json()
    assert chat["count"] == client.messages.count_tokens(model="small", messages=MESSAGES).input_tokens


# An engine whose answers are written here


REQUEST: Any = {"model": "m", "max_tokens": 64, "messages": MESSAGES, "tools": [WEATHER]}
written_engine = partial(use_written_engine, partial(anthropic.AsyncAnthropic, base_url="http://test"))


async def streamed(client: anthropic.AsyncAnthropic) -> Any:
    async with client.messages.stream(**REQUEST) as stream:
        return await stream.get_final_message()


async def whole(client: anthropic.AsyncAnthropic) -> Any:
    return await client.messages.create(**REQUEST)


async def beta(client: anthropic.AsyncAnthropic) -> Any:
    return await client.beta.messages.create(**REQUEST, betas=["interleaved-thinking-2025-05-14"])


@pytest.mark.parametrize("use", [streamed, whole, beta])
def test_thinking_text_and_calls_are_blocks_of_a_message(use: Any) -> None:
    message = written_engine(FakeEngine(ANSWER), use)
    thinking, text, call = message.content
    assert (thinking.type, thinking.thinking, text.type, text.text) == ("thinking", "Hmm", "text", "Look: ")
    assert thinking.signature
    assert (call.type, call.name, call.input) == ("tool_use", "get_weather", {"city": "Rio", "days": 2})
    assert (message.stop_reason, message.usage.output_tokens) == ("tool_use", len(ids_of("".join(ANSWER))))
    assert message.usage.output_tokens_details.thinking_tokens == len(ids_of("<think>Hmm</think>"))
    assert message.usage.cache_read_input_tokens == 2
    again = [*MESSAGES, message.model_dump(include={"role", "content"})]
    assert again[-1]["content"][2]["input"] == {"city": "Rio", "days": 2}


@pytest.mark.parametrize(
    ("pieces", "kind"),
    [
        ([QueueFull("full", retry_after_s=1)], anthropic.RateLimitError),
        ([EngineUnavailable("it starts")], anthropic.InternalServerError),
        (["Hi", QueueFull("full")], anthropic.APIStatusError),
    ],
)
def test_an_error_of_the_engine_has_a_class_before_and_in_a_stream(pieces: list[Any], kind: Any) -> None:
    with pytest.raises(kind) as raised:
        written_engine(FakeEngine(pieces), streamed)
    assert raised.value.body["error"]["type"] in ("rate_limit_error", "overloaded_error")


def test_a_wrong_key_is_an_authentication_error() -> None:
    async def use(client: anthropic.AsyncAnthropic) -> AsyncIterator[Any]:
        return await client.with_options(api_key="x").messages.create(**REQUEST)

    with pytest.raises(anthropic.AuthenticationError, match="not one of this server"):
        written_engine(FakeEngine(), use)
