"""The Responses API of a running engine with two server processes, used through the official client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest

from pipeline import Pipeline
from tests.integration.conftest import TINY_CONFIG

pytestmark = pytest.mark.slow

NUM_PROCESSES = 2
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"unit": {"enum": ["c", "f"]}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
        "required": ["unit", "days"],
        "additionalProperties": False,
    },
}
GREEDY: Any = {"model": "tiny-model", "temperature": 0, "max_output_tokens": 24}


class Vote(pydantic.BaseModel):
    choice: Literal["yes", "no"]
    weight: int = pydantic.Field(ge=0, le=9)


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with Pipeline(TINY_CONFIG, ["scheduler.max_model_len=1024", f"http.num_workers={NUM_PROCESSES}"]) as pipeline:
        assert pipeline.http_url is not None
        # Without connections that stay open, each request goes to either process.
        headers = {"connection": "close"}
        yield openai.OpenAI(base_url=f"{pipeline.http_url}/v1", api_key="x", default_headers=headers, max_retries=0)


def test_a_stream_gives_the_text_of_the_whole_response(client: openai.OpenAI) -> None:
    whole = client.responses.create(input="Once upon a time", **GREEDY)
    with client.responses.stream(input="Once upon a time", **GREEDY) as stream:
        events = list(stream)
    assert whole.status == "incomplete"
    assert whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage is not None
    assert whole.usage.output_tokens == GREEDY["max_output_tokens"]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 1
    assert "".join(deltas) == whole.output_text
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_an_answer_follows_the_schema_of_a_model(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(model="tiny-model", input="Vote", text_format=Vote, max_output_tokens=200)
    assert parsed.output_parsed is not None
    assert parsed.output_parsed.choice in ("yes", "no")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
def test_a_call_is_valid_and_its_output_continues_the_conversation(client: openai.OpenAI, choice: Any) -> None:
    first = client.responses.create(
        model="tiny-model",
        input="Weather?",
        tools=[WEATHER],
        tool_choice=choice,
        parallel_tool_calls=False,
        max_output_tokens=200,
    )
    (call,) = first.output
    assert call.type == "function_call"
    arguments = json.loads(call.arguments)
    assert arguments["unit"] in ("c", "f")
    assert 1 <= arguments["days"] <= 7
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."}
    second = client.responses.create(input=[output], previous_response_id=first.id, tools=[WEATHER], **GREEDY)
    assert second.output_text


def test_every_process_continues_reads_and_deletes_a_response(client: openai.OpenAI) -> None:
    response = client.responses.create(input="Count with me: one, two", **GREEDY)
    for _ in range(4 * NUM_PROCESSES):
        assert client.responses.retrieve(response.id).output_text == response.output_text
        response = client.responses.create(input="And?", previous_response_id=response.id, **GREEDY)
    assert response.usage is not None
    assert response.usage.input_tokens_details.cached_tokens > 0
    texts = [item.content[0].text for item in client.responses.input_items.list(response.id, order="asc")]  # type: ignore
    assert texts[0] == "Count with me: one, two"
    assert len(texts) == 8 * NUM_PROCESSES + 1
    client.responses.delete(response.id)
    for _ in range(2 * NUM_PROCESSES):
        with pytest.raises(openai.NotFoundError, match="does not keep"):
            client.responses.create(input="And?", previous_response_id=response.id, **GREEDY)


def test_log_probabilities_come_with_each_token_of_the_text(client: openai.OpenAI) -> None:
    include: Any = ["message.output_text.logprobs"]
    response = client.responses.create(input="Hello", include=include, top_logprobs=2, **GREEDY)
    part: Any = response.output[-1]
    rows = part.content[0].logprobs
    assert len(rows) == GREEDY["max_output_tokens"]
    assert all(len(row.top_logprobs) == 2 and row.logprob <= 0 for row in rows)
    assert b"".join(bytes(row.bytes) for row in rows).decode("utf-8", "replace") == response.output_text


def test_a_stream_that_cannot_begin_has_the_status_of_its_error(client: openai.OpenAI) -> None:
    too_long: Any = {"model": "tiny-model", "input": "word " * 2_000}
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**too_long, stream=True)
    assert caught.value.code == "context_length_exceeded"
    truncated = client.responses.create(**too_long, truncation="auto", max_output_tokens=8)
    assert truncated.usage is not None
    assert 900 < truncated.usage.input_tokens <= 1024
    assert client.responses.input_tokens.count(**too_long).input_tokens > 1024
