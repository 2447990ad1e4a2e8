"""OpenAI's own Python package against the server: in front of a running engine, and of one whose answers are written
here, because the small model does not call tools by itself. `test_responses.py` covers the Responses API."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest

from ipc.errors import EngineUnavailable, QueueFull
from pipeline import Pipeline
from tests.integration.conftest import TINY_CONFIG
from tests.integration.weather_calls import CALL_RIO, MESSAGES, WEATHER_NAME, WEATHER_SCHEMA, use_written_engine
from tests.unit.pipeline.http.fake_engine import FakeEngine

pytestmark = pytest.mark.slow

MODEL = "org/small"
MAX_OPEN = 6
GREEDY: Any = {"model": MODEL, "temperature": 0, "max_tokens": 16}
LONG: Any = {"model": MODEL, "max_tokens": 900, "extra_body": {"ignore_eos": True}}
WEATHER: Any = {
    "type": "function",
    "function": {**WEATHER_NAME, "strict": True, "parameters": WEATHER_SCHEMA},
}
CLOCK: Any = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


class Vote(pydantic.BaseModel):
    """A format of answers."""

    choice: Literal["yes", "no"]
    weight: int = pydantic.Field(ge=0, le=9)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    keys: Path = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text("right-key\nsecond-key\n")
    keys.chmod(0o600)
    overrides = {
        "scheduler.max_model_len": 1024,
        "frontend.max_open_requests": MAX_OPEN,
        "http.served_model_names": [MODEL, "small"],
        "http.api_key_file": str(keys),
    }
    with Pipeline(TINY_CONFIG, overrides) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def client(engine: Pipeline) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{engine.http_url}/v1", api_key="right-key", max_retries=0) as client:
        yield client


def wait_idle(engine: Pipeline) -> None:
    """Wait until the engine runs no sequence, and the gateway has answered every request."""
    deadline = time.monotonic() + 10
    busy = {"scheduler": ("num_running", "num_waiting"), "gateway": ("num_open",)}
    while any((stats := engine.client.stats()) and stats[role][name] for role in busy for name in busy[role]):
        assert time.monotonic() < deadline, "the engine is still busy"


# Completions


def test_a_completion_and_its_stream_say_the_same(client: openai.OpenAI) -> None:
    whole = client.completions.create(prompt="The for statement", **GREEDY)
    assert whole.usage is not None
    assert (whole.model, whole.choices[0].finish_reason, whole.usage.completion_tokens) == (MODEL, "length", 16)
    chunks = list(
        client.completions.create(
            prompt="The for statement", stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_every_prompt_has_n_choices_and_token_ids_are_prompts(client: openai.OpenAI, engine: Pipeline) -> None:
    prompts = ["The for statement", "A class"]
    texts = client.completions.create(model=MODEL, prompt=prompts, n=2, seed=1, temperature=1, max_tokens=8).choices
    assert [choice.index for choice in texts] == [0, 1, 2, 3]
    assert len({choice.text for choice in texts}) == 4
    ids = [list(engine.client.tokenize(prompt).token_ids) for prompt in prompts]
    of_ids = client.completions.create(prompt=ids, **GREEDY).choices
    of_texts = client.completions.create(prompt=prompts, **GREEDY).choices
    assert [choice.text for choice in of_ids] == [choice.text for choice in of_texts]


def test_log_probabilities_score_the_prompt_and_the_text(client: openai.OpenAI) -> None:
    prompt = "The for statement is used to"
    scored = client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=0, echo=True, logprobs=1, temperature=0
    ).choices[0]
    assert scored.text == prompt
    found = scored.logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.token_logprobs is not None
    assert "".join(found.tokens) == prompt
    assert found.token_logprobs[0] is None
    assert all(value < 0 for value in found.token_logprobs[1:])
    assert found.text_offset == [len("".join(found.tokens[:i])) for i in range(len(found.tokens))]


# Chats


def test_a_chat_and_its_stream_say_the_same(client: openai.OpenAI) -> None:
    request: Any = {"messages": [{"role": "system", "content": "Be brief."}, *MESSAGES], **GREEDY, "max_tokens": 400}
    whole = client.chat.completions.create(**request)
    [choice] = whole.choices
    assert (whole.model, choice.message.role, choice.finish_reason) == (MODEL, "assistant", "stop")
    assert whole.usage is not None
    with client.chat.completions.stream(**request, stream_options={"include_usage": True}) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert len(deltas) > 4
    assert "".join(deltas) == choice.message.content == final.choices[0].message.content
    assert final.choices[0].finish_reason == "stop"
    assert final.usage is not None
    assert final.usage.completion_tokens == whole.usage.completion_tokens


def test_log_probabilities_come_with_each_token_of_each_choice(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, n=2, seed=7, max_completion_tokens=6, logprobs=True, top_logprobs=3
    )
    assert [choice.index for choice in chat.choices] == [0, 1]
    for choice in chat.choices:
        assert choice.logprobs is not None
        rows = choice.logprobs.content
        assert rows is not None
        assert len(rows) == 6
        assert b"".join(bytes(row.bytes or b"") for row in rows).decode("utf-8", "replace") == choice.message.content
        for row in rows:
            assert len(row.top_logprobs) == 3
            assert max(each.logprob for each in row.top_logprobs) >= row.logprob


def test_an_answer_has_the_format_that_the_client_parses(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model=MODEL, messages=MESSAGES, response_format=Vote, max_completion_tokens=200
    ).choices[0]
    assert isinstance(parsed.message.parsed, Vote)
    with client.chat.completions.stream(
        model=MODEL, messages=MESSAGES, response_format=Vote, max_completion_tokens=200
    ) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Vote)
    response = client.responses.parse(model=MODEL, input="Vote", text_format=Vote, max_output_tokens=200)
    assert isinstance(response.output_parsed, Vote)
    loose = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, response_format={"type": "json_object"}, temperature=0, max_tokens=300
    ).choices[0]
    assert loose.finish_reason == "length" or isinstance(json.loads(loose.message.content or ""), dict)


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_call_that_the_request_demands_is_valid_and_its_result_is_answered(
    client: openai.OpenAI, choice: Any
) -> None:
    request: Any = {
        "model": MODEL, "messages": MESSAGES, "tools": [WEATHER, CLOCK], "max_completion_tokens": 200, "seed": 3,
    }  # fmt: skip
    if choice == "required":
        request["parallel_tool_calls"] = False
    answer = client.chat.completions.create(**request, tool_choice=choice)
    with client.chat.completions.stream(**request, tool_choice=choice) as stream:
        events = list(stream)
        streamed = stream.get_final_completion().choices[0]
    assert streamed.message.tool_calls is not None
    assert any(event.type == "tool_calls.function.arguments.done" for event in events)
    message = answer.choices[0].message
    assert message.content is None
    assert message.tool_calls is not None
    [call] = message.tool_calls
    assert call.type == "function"
    assert [each.function.name for each in streamed.message.tool_calls] == [call.function.name]
    if choice == NAMED:
        assert call.function.name == "get_weather"
        assert 1 <= json.loads(call.function.arguments)["days"] <= 7
    assert answer.choices[0].finish_reason == ("tool_calls" if choice == "required" else "stop")
    result = {"role": "tool", "tool_call_id": call.id, "content": "Rain."}
    again = client.chat.completions.create(**{**request, "messages": [*MESSAGES, message, result]})
    assert again.choices[0].message.content


def test_tools_that_the_model_may_call_leave_its_text_as_it_is(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(messages=MESSAGES, tools=[WEATHER], tool_choice="auto", **GREEDY).choices[0]
    assert answer.message.content
    assert not answer.message.tool_calls
    assert answer.finish_reason in ("stop", "length")
    without = client.chat.completions.create(messages=MESSAGES, tools=[WEATHER], tool_choice="none", **GREEDY)
    assert without.choices[0].message.content


# Responses


def test_a_response_continues_the_one_before(client: openai.OpenAI) -> None:
    first = client.responses.create(model=MODEL, input="What is a class?", temperature=0, max_output_tokens=8)
    second = client.responses.create(
        model=MODEL, input="And?", previous_response_id=first.id, temperature=0, max_output_tokens=8
    )
    assert second.previous_response_id == first.id
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.input_tokens > first.usage.total_tokens
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_0")


# Errors


def test_errors_are_of_the_clients_classes(client: openai.OpenAI) -> None:
    def ask(**changes: Any) -> Any:
        return client.chat.completions.create(**{"messages": MESSAGES, **GREEDY, **changes})

    with pytest.raises(openai.BadRequestError, match=r"temperature \(3\.0\) must lie in \[0, 2\]") as bad:
        ask(temperature=3.0)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    assert bad.value.request_id
    with pytest.raises(openai.BadRequestError) as long:
        ask(messages=[{"role": "user", "content": "word " * 2_000}], stream=True)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="did you mean top_k"):
        ask(extra_body={"topk": 3})
    with pytest.raises(openai.NotFoundError, match="is not served here") as missing:
        ask(model="gpt-4o")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no/such-model")
    with pytest.raises(openai.NotFoundError, match="there is no endpoint /v1/embeddings"):
        client.embeddings.create(model=MODEL, input="Hi")
    for key in ("wrong", ""):
        with pytest.raises(openai.AuthenticationError) as unknown:
            client.with_options(api_key=key or "x", default_headers={} if key else {"Authorization": ""}).models.list()
        assert unknown.value.code == "invalid_api_key"
    with pytest.raises(openai.APIStatusError, match="deadline_s is over") as late:
        ask(extra_body={"deadline_s": 1e-6})
    assert (late.value.status_code, late.value.code) == (408, "deadline")
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.01).chat.completions.create(messages=MESSAGES, **LONG)


def test_too_many_requests_are_refused_with_a_time_to_wait_and_a_closed_stream_frees_its_place(
    client: openai.OpenAI, engine: Pipeline
) -> None:
    wait_idle(engine)
    before = engine.client.stats()["scheduler"]["num_sampled_tokens"]
    with ExitStack() as streams:
        for _ in range(MAX_OPEN):
            stream = streams.enter_context(client.chat.completions.create(messages=MESSAGES, stream=True, **LONG))
            next(iter(stream))
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(messages=MESSAGES, stream=True, **GREEDY)
        assert refused.value.code == "queue_full"
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert engine.client.stats()["scheduler"]["num_running"] > 0
    wait_idle(engine)
    assert engine.client.stats()["scheduler"]["num_sampled_tokens"] - before < MAX_OPEN * LONG["max_tokens"] / 2
    assert client.chat.completions.create(messages=MESSAGES, **GREEDY).choices


# Requests and answers as they are


def test_the_clients_request_id_comes_back_and_models_have_slashes(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        messages=MESSAGES, extra_headers={"X-Request-Id": "mine-1"}, **GREEDY
    )
    assert raw.headers["x-request-id"] == "mine-1"
    completion = raw.parse()
    assert completion._request_id == "mine-1"
    assert completion.choices[0].message.content
    with client.chat.completions.with_streaming_response.create(messages=MESSAGES, stream=True, **GREEDY) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert [line for line in response.iter_lines() if line][-1] == "data: [DONE]"
    assert [model.id for model in client.models.list()] == [MODEL, "small"]
    assert client.models.retrieve(MODEL).id == MODEL


def test_the_asynchronous_client_has_many_streams_open(engine: Pipeline) -> None:
    async def text_of(client: openai.AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(messages=MESSAGES, stream=True, **GREEDY)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

    async def all_texts() -> list[str]:
        url = f"{engine.http_url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="second-key", max_retries=0) as client:
            return await asyncio.gather(*(text_of(client) for _ in range(MAX_OPEN)))

    texts = asyncio.run(all_texts())
    assert texts[0]
    assert texts == [texts[0]] * MAX_OPEN


# An engine whose answers are written here

CALL_NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
REQUEST: Any = {"model": "m", "messages": MESSAGES, "tools": [WEATHER, CLOCK]}
written_engine = partial(use_written_engine, partial(openai.AsyncOpenAI, base_url="http://test/v1"))


async def streamed(client: openai.AsyncOpenAI) -> Any:
    async with client.chat.completions.stream(**REQUEST) as stream:
        return await stream.get_final_completion()


async def whole(client: openai.AsyncOpenAI) -> Any:
    return await client.chat.completions.create(**REQUEST)


@pytest.mark.parametrize("use", [streamed, whole])
def test_parallel_calls_that_the_model_chose_are_made_and_their_results_sent_back(use: Any) -> None:
    text = "<think>Hmm</think>\n\n" + CALL_RIO + "\n" + CALL_NOW
    engine = FakeEngine([text[i : i + 7] for i in range(0, len(text), 7)])
    completion = written_engine(engine, use)
    [choice] = completion.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.reasoning_content == "Hmm"
    calls = [(each.function.name, json.loads(each.function.arguments)) for each in choice.message.tool_calls]
    assert calls == [("get_weather", {"city": "Rio", "days": 2}), ("now", {})]
    results = [
        {"role": "tool", "tool_call_id": each.id, "content": f"result {i}"}
        for i, each in enumerate(choice.message.tool_calls)
    ]
    engine.pieces = ["Rain", " at 9."]
    again: Any = {**REQUEST, "messages": [*MESSAGES, choice.message, *results]}
    answer = written_engine(engine, lambda client: client.chat.completions.create(**again))
    assert answer.choices[0].message.content == "Rain at 9."
    seen = [dict(message) for message in engine.chats[-1].messages]
    assert [message["role"] for message in seen] == ["user", "assistant", "tool", "tool"]
    assert [message["content"] for message in seen[2:]] == ["result 0", "result 1"]


@pytest.mark.parametrize(
    ("pieces", "kind"),
    [
        ([QueueFull("full", retry_after_s=1)], openai.RateLimitError),
        ([EngineUnavailable("it starts")], openai.InternalServerError),
        (["Hi", QueueFull("full")], openai.APIError),
    ],
)
def test_an_error_of_the_engine_has_a_class_before_and_in_a_stream(pieces: list[Any], kind: Any) -> None:
    with pytest.raises(kind) as raised:
        written_engine(FakeEngine(pieces), streamed)
    assert raised.value.body["type"] in ("rate_limit_error", "service_unavailable_error")
