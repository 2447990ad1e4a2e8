"""Frameworks on top of OpenAI's API, and the official packages, against a running engine. Only the URL is ours.

The small model neither follows instructions nor calls tools by itself, so the tests demand calls and formats: a grammar
then makes them valid.
"""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import anthropic
import instructor
import litellm
import openai
import pytest
from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool
from agents import set_tracing_disabled as set_agents_tracing_disabled
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from openai.types.responses import ResponseTextDeltaEvent
from pydantic import BaseModel, Field
from pydantic_ai import Agent as PydanticAgent
from pydantic_ai import NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.models.openai import OpenAIResponsesModel as PydanticResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

QUESTION = "What is the for statement?"
MESSAGES: Any = [{"role": "user", "content": QUESTION}]


class Vote(BaseModel):
    """A vote."""

    choice: Literal["yes", "no"]
    weight: int = Field(ge=0, le=9)


@tool
def get_weather(city: Literal["Rio", "Bonn"], days: int) -> str:
    """The weather of a city."""
    return f"{days} days of rain in {city}"


# LangChain


@pytest.fixture
def chat_openai(url: str, model: str) -> ChatOpenAI:
    return ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=model, temperature=0, max_tokens=200, max_retries=0)  # type: ignore


def test_langchain_invokes_and_streams(chat_openai: ChatOpenAI) -> None:
    message = chat_openai.invoke(QUESTION)
    assert message.content
    assert message.usage_metadata is not None
    assert message.usage_metadata["output_tokens"] > 0
    chunks = list(chat_openai.stream(QUESTION, stream_usage=True))
    assert len(chunks) > 4
    assert "".join(str(chunk.content) for chunk in chunks) == message.content
    assert [len(answer.content) > 0 for answer in chat_openai.batch([QUESTION, "What is a class?"])] == [True, True]


def test_langchain_binds_tools_and_sends_their_results_back(chat_openai: ChatOpenAI) -> None:
    message = chat_openai.bind_tools([get_weather], tool_choice="get_weather").invoke(QUESTION)
    assert isinstance(message, AIMessage)
    [call] = message.tool_calls
    assert call["args"]["city"] in ("Rio", "Bonn")
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage)
    final = chat_openai.bind_tools([get_weather]).invoke([HumanMessage(QUESTION), message, result])
    assert final.usage_metadata


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_reads_structured_output(chat_openai: ChatOpenAI, method: Any) -> None:
    assert isinstance(chat_openai.with_structured_output(Vote, method=method).invoke("Vote!"), Vote)


def test_langchain_uses_the_responses_api(url: str, model: str) -> None:
    chat = ChatOpenAI(
        base_url=f"{url}/v1",
        api_key="none",
        model=model,
        max_tokens=60,
        use_responses_api=True,
        temperature=0,  # type: ignore
    )
    message = chat.invoke(QUESTION)
    assert message.text
    assert "".join(chunk.text for chunk in chat.stream(QUESTION)) == message.text
    assert isinstance(chat.with_structured_output(Vote).invoke("Vote!"), Vote)


def test_langchain_completes_text(url: str, model: str) -> None:
    complete = OpenAI(base_url=f"{url}/v1", api_key="none", model=model, max_tokens=20, temperature=0)  # type: ignore
    text = complete.invoke("The for statement")
    assert text
    assert "".join(complete.stream("The for statement")) == text


# LiteLLM


@pytest.fixture
def lite(url: str, model: str) -> dict[str, Any]:
    return {"model": f"hosted_vllm/{model}", "api_base": f"{url}/v1", "api_key": "none", "temperature": 0}


@pytest.mark.parametrize("provider", ["hosted_vllm", "openai"])
def test_litellm_chats_and_streams(lite: dict[str, Any], provider: str, model: str) -> None:
    request = {**lite, "model": f"{provider}/{model}", "max_tokens": 30, "messages": MESSAGES}
    whole: Any = litellm.completion(**request)
    assert whole.choices[0].message.content
    assert 0 < whole.usage.completion_tokens <= 30
    stream: Any = litellm.completion(**request, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole.choices[0].message.content


def test_litellm_calls_tools_reads_formats_and_completes_text(lite: dict[str, Any], url: str, model: str) -> None:
    function = {"name": "vote", "parameters": Vote.model_json_schema()}
    called: Any = litellm.completion(
        **lite, messages=MESSAGES, tools=[{"type": "function", "function": function}], tool_choice="required",
        max_tokens=200,
    )  # fmt: skip
    assert Vote.model_validate_json(called.choices[0].message.tool_calls[0].function.arguments)
    formed: Any = litellm.completion(**lite, messages=MESSAGES, response_format=Vote, max_tokens=200)
    assert Vote.model_validate_json(formed.choices[0].message.content)
    text: Any = litellm.text_completion(
        model=f"text-completion-openai/{model}", api_base=f"{url}/v1", api_key="none", prompt="A class", max_tokens=8
    )
    assert text.choices[0].text
    answer: Any = litellm.responses(
        model=f"openai/{model}", api_base=f"{url}/v1", api_key="none", input=QUESTION, max_output_tokens=20
    )
    assert answer.output[0].content[0].text


def test_litellm_raises_its_classes_of_errors(lite: dict[str, Any]) -> None:
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**{**lite, "temperature": 5}, messages=MESSAGES)
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**lite, messages=[{"role": "user", "content": "word " * 2_000}])
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**{**lite, "model": "hosted_vllm/other"}, messages=MESSAGES)


# Instructor


@pytest.mark.parametrize("mode", ["TOOLS", "TOOLS_STRICT", "JSON_SCHEMA"])
def test_instructor_gives_objects(url: str, model: str, mode: str) -> None:
    client = instructor.from_openai(
        openai.OpenAI(base_url=f"{url}/v1", api_key="none"), mode=getattr(instructor.Mode, mode)
    )
    vote = client.chat.completions.create(
        model=model, messages=MESSAGES, response_model=Vote, max_tokens=300, max_retries=0
    )
    assert isinstance(vote, Vote)


def test_instructor_streams_parts_of_an_object(url: str, model: str) -> None:
    client = instructor.from_openai(openai.OpenAI(base_url=f"{url}/v1", api_key="none"), mode=instructor.Mode.TOOLS)
    parts = list(client.chat.completions.create_partial(model=model, messages=MESSAGES, response_model=Vote))
    assert len(parts) > 1
    assert Vote.model_validate(parts[-1].model_dump())


# Pydantic AI


@pytest.mark.parametrize("kind", [OpenAIChatModel, PydanticResponsesModel], ids=["chat", "responses"])
def test_pydantic_ai_runs_streams_and_gives_objects(url: str, model: str, kind: Any) -> None:
    of_engine = kind(model, provider=OpenAIProvider(base_url=f"{url}/v1", api_key="none"))
    settings: Any = {"max_tokens": 300, "temperature": 0}
    agent = PydanticAgent(of_engine, model_settings=settings)
    text = agent.run_sync(QUESTION).output
    assert text

    async def stream() -> list[str]:
        async with agent.run_stream(QUESTION) as result:
            return [part async for part in result.stream_text(delta=True, debounce_by=None)]

    parts = asyncio.run(stream())
    assert len(parts) > 4
    assert "".join(parts) == text
    for output in (NativeOutput(Vote), ToolOutput(Vote)):
        typed: Any = PydanticAgent(of_engine, output_type=output, model_settings=settings, retries=0)
        assert isinstance(typed.run_sync("Vote!").output, Vote)


# OpenAI Agents


@pytest.mark.parametrize("kind", [OpenAIChatCompletionsModel, OpenAIResponsesModel], ids=["chat", "responses"])
def test_openai_agents_run_a_tool_and_give_an_object(url: str, model: str, kind: Any) -> None:
    set_agents_tracing_disabled(True)
    called: list[int] = []

    @function_tool
    def count(number: Literal[1, 2, 3]) -> str:
        """Count."""
        called.append(number)
        return "counted"

    async def run() -> tuple[Any, str, Any]:
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
        of_engine = kind(model=model, openai_client=client)
        # The agent resets the choice after the first call, so the second answer is text.
        settings = ModelSettings(tool_choice="required", max_tokens=300, temperature=0, parallel_tool_calls=False)
        agent = Agent(name="a", instructions="Count.", model=of_engine, tools=[count], model_settings=settings)
        counted = await Runner.run(agent, "One")
        talker = Agent(name="b", model=of_engine, model_settings=ModelSettings(max_tokens=40, temperature=0))
        streamed = Runner.run_streamed(talker, QUESTION)
        deltas = [
            event.data.delta
            async for event in streamed.stream_events()
            if event.type == "raw_response_event" and isinstance(event.data, ResponseTextDeltaEvent)
        ]
        assert "".join(deltas) == streamed.final_output
        voter = Agent(name="c", model=of_engine, output_type=Vote, model_settings=ModelSettings(max_tokens=300))
        voted = await Runner.run(voter, "Vote!")
        await client.close()
        return counted.final_output, streamed.final_output, voted.final_output

    counted, text, vote = asyncio.run(run())
    assert called
    assert called[0] in (1, 2, 3)
    assert isinstance(counted, str)
    assert text
    assert isinstance(vote, Vote)


# The official packages, in the versions that the frameworks take


def test_openai_and_anthropic_answer(url: str, model: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    vote = client.chat.completions.parse(model=model, messages=MESSAGES, response_format=Vote, max_tokens=200)
    assert isinstance(vote.choices[0].message.parsed, Vote)
    claude = anthropic.Anthropic(base_url=url, api_key="none")
    message = claude.messages.create(model=model, max_tokens=20, messages=MESSAGES)
    assert message.content[0].type == "text"
    with claude.messages.stream(model=model, max_tokens=20, messages=MESSAGES) as stream:
        assert "".join(stream.text_stream)
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="claude", max_tokens=20, messages=MESSAGES)
