"""Runs a chat on the engine, and gives what the model says as events. Every chat API renders these in its own form.

AsyncClient --Output--> one parser per sample --Part--> chat completions, responses, messages
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import msgspec

from ipc.sampling_params import SamplingParams
from ipc.scheduling_params import DEFAULT_SCHEDULING, SchedulingParams
from pipeline.client.chat_input import Chat
from pipeline.client.outputs import Output, TokenLogprob, Usage
from pipeline.client.streams import OutputStream
from pipeline.http.generation.endings import OpenAIFinish, finish_reason
from pipeline.http.generation.events import Content, Event, Reasoning, ToolArguments, ToolCallBegin
from pipeline.http.parsing.formats import CallForm, OutputFormat, OutputParser
from pipeline.http.parsing.scanner import Tool
from pipeline.http.service import Service
from pipeline.http.tracing import note_sample, note_usage


@dataclass(frozen=True, kw_only=True)
class ChatRun:
    """One request for a chat, in whichever API it arrived.

    Args:
        call_form: how the answer may hold calls of tools.
        tools: definitions of functions; parsers take the types of arguments from them.
        starts_in_reasoning: the prompt ends inside the model's reasoning.
    """

    chat: Chat
    params: SamplingParams
    request_id: str
    call_form: CallForm = "none"
    tools: Sequence[Tool] = ()
    starts_in_reasoning: bool = False
    cache_salt: str = ""
    scheduling: SchedulingParams = DEFAULT_SCHEDULING


@dataclass(slots=True, kw_only=True)
class RunUsage:
    """Tokens of a request. `reasoning_tokens` are part of `completion_tokens`, of all samples together."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> Self:
        """Of an answer without reasoning."""
        return cls(
            prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, cached_tokens=cached_tokens,
            reasoning_tokens=0,
        )  # fmt: skip


class Part(msgspec.Struct, kw_only=True):
    """What is new of one sample. `finish_reason` is set in a sample's last part, `usage` in the request's last one.

    `stop_reason`: the stop string that ended the sample, or "deadline". `prompt_usage`: the usage without generated
    tokens, in the first part of sample 0 that has tokens.
    """

    index: int
    events: list[Event]
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: OpenAIFinish | None = None
    stop_reason: str | None = None
    usage: RunUsage | None = None
    prompt_usage: RunUsage | None = None


@dataclass(slots=True)
class ToolCall:
    """A whole call of a tool. `arguments` is JSON text, as the model wrote it."""

    name: str
    arguments: str
    call_id: str | None


@dataclass(slots=True, kw_only=True)
class Answer:
    """A whole sample."""

    index: int
    reasoning: str | None
    content: str | None
    tool_calls: list[ToolCall]
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: OpenAIFinish
    stop_reason: str | None


async def stream_parts(service: Service, run: ChatRun) -> AsyncIterator[Part]:
    """The parts of all samples as they are generated. Raises HttpError, and what `AsyncClient.generate` raises."""
    reader = StreamReader(service, run)
    async with reader.start() as stream:
        async for output in stream:
            yield reader.read(output)


class StreamReader:
    """Reads the Outputs of a run that is streamed, of all its samples."""

    def __init__(self, service: Service, run: ChatRun) -> None:
        self._service = service
        self._run = run
        self._samples = [_SampleReader(service.format, run, index) for index in range(run.params.n)]

    def start(self) -> OutputStream:
        """Send the request. Raises InvalidRequest; the stream raises what `AsyncClient.generate` raises."""
        run = self._run
        return self._service.client.generate(
            run.chat, _params_of(self._service, run), stream=True, request_id=run.request_id, cache_salt=run.cache_salt,
            scheduling=run.scheduling,
        )  # fmt: skip

    def read(self, output: Output) -> Part:
        """The part of an Output. Raises HttpError if the request has run out of time without a token."""
        part = self._samples[output.index].read(output)
        if output.usage is not None:
            part.usage = _usage(output.usage, self._samples)
        if output.prompt_usage is not None:
            part.prompt_usage = _usage(output.prompt_usage, readers=[])
        return part


async def whole_answer(service: Service, run: ChatRun) -> tuple[list[Answer], RunUsage]:
    """All samples once they have ended. Raises as `stream_parts` does."""
    readers = [_SampleReader(service.format, run, index) for index in range(run.params.n)]
    output = await service.client.generate(
        run.chat, _params_of(service, run), request_id=run.request_id, cache_salt=run.cache_salt,
        scheduling=run.scheduling,
    )  # fmt: skip
    answers = []
    for sample, reader in zip(output.completions, readers, strict=True):
        part = reader.read(sample)
        answers.append(_answer(part))
    answers[0].prompt_logprobs = output.prompt_logprobs
    assert output.usage is not None, "a whole output has its usage"
    return answers, _usage(output.usage, readers)


class _SampleReader:
    """Reads one sample: parses its text, counts its tokens of reasoning, and knows how it ended."""

    def __init__(self, format: OutputFormat, run: ChatRun, index: int) -> None:
        self._parser: OutputParser = format.parser(
            reads_calls=run.call_form, tools=run.tools, starts_in_reasoning=run.starts_in_reasoning
        )
        has_reasoning = format.reasoning_parser is not None or format.reasoning_tags is not None
        self._reasoning = ReasoningCounter(format, run.starts_in_reasoning) if has_reasoning else None
        self._index = index
        self._num_tokens = 0
        self._has_calls = False
        self._call_form = run.call_form

    @property
    def num_reasoning_tokens(self) -> int:
        return 0 if self._reasoning is None else self._reasoning.num_tokens

    def read(self, output: Any) -> Part:
        """The part of an Output of a stream, or of a Completion, which is a whole sample."""
        events = self._parser.push(output.text) if output.text else []
        reason = output.finish_reason
        if reason is not None:
            events += self._parser.finish()
        self._num_tokens += len(output.token_ids)
        if self._reasoning is not None:
            self._reasoning.count(output.token_ids, events)
        part = Part(index=self._index, events=events, token_ids=output.token_ids, logprobs=output.logprobs)
        if self._call_form != "none" and not self._has_calls:
            self._has_calls = any(isinstance(event, ToolCallBegin) for event in events)
        if reason is not None:
            note_sample(output.times)
            part.finish_reason, part.stop_reason = finish_reason(
                reason, output.stop_reason, has_tokens=self._num_tokens > 0
            )
            # OpenAI's API says "stop" for a function that the request names.
            if part.finish_reason == "stop" and self._has_calls and self._call_form != "json_arguments":
                part.finish_reason = "tool_calls"
        return part


class ReasoningCounter:
    """Counts the tokens of a sample's reasoning, tags included.

    The token that ends the reasoning tells exactly if it is one token of the vocabulary. Otherwise tokens count by the
    share of reasoning in the text that arrived with them: exact for one token, an estimate for a whole answer.
    """

    def __init__(self, format: OutputFormat, starts_in_reasoning: bool) -> None:
        self.num_tokens = 0
        self._end_id = format.reasoning_end_id
        self._begin_id = format.reasoning_begin_id
        self._is_inside = starts_in_reasoning or format.always_reasons

    def count(self, token_ids: Sequence[int], events: Sequence[Event]) -> None:
        """More tokens have arrived, and the events that their text gave."""
        if self._end_id is None:
            self.num_tokens += round(len(token_ids) * _share_of_reasoning(events))
            return
        for token_id in token_ids:
            if self._is_inside or token_id == self._begin_id:
                self.num_tokens += 1
                self._is_inside = token_id != self._end_id


def _share_of_reasoning(events: Sequence[Event]) -> float:
    num_chars = num_reasoning_chars = 0
    for event in events:
        length = len(event[0])  # the text, or a function's name
        num_chars += length
        if isinstance(event, Reasoning):
            num_reasoning_chars += length
    return num_reasoning_chars / num_chars if num_chars else 0.0


def _params_of(service: Service, run: ChatRun) -> SamplingParams:
    """The parameters with the special tokens' text, if the model's calls or its reasoning are written with them."""
    format = service.format
    if run.params.skip_special_tokens and format.needs_special_tokens and (
        run.call_form == "native" or format.reasoning_parser is not None
    ):  # fmt: skip
        return run.params.with_special_tokens()
    return run.params


def _usage(usage: Usage, readers: Sequence[_SampleReader]) -> RunUsage:
    note_usage(usage.prompt_tokens, usage.completion_tokens)
    return RunUsage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.num_cached_tokens,
        reasoning_tokens=sum(reader.num_reasoning_tokens for reader in readers),
    )


@dataclass(slots=True)
class AnswerBuilder:
    """Puts the events of one sample together."""

    reasoning: list[str] = field(default_factory=list)
    content: list[str] = field(default_factory=list)
    tool_calls: list[ToolCall] = field(default_factory=list)

    def add(self, events: Sequence[Event]) -> None:
        """More events of the sample, in their order."""
        for event in events:
            match event:
                case Content(text):
                    self.content.append(text)
                case Reasoning(text):
                    self.reasoning.append(text)
                case ToolCallBegin(name, call_id):
                    self.tool_calls.append(ToolCall(name, "", call_id))
                case ToolArguments(text):
                    self.tool_calls[-1].arguments += text


def _answer(part: Part) -> Answer:
    built = AnswerBuilder()
    built.add(part.events)
    assert part.finish_reason is not None, "a whole sample has ended"
    content = "".join(built.content)
    return Answer(
        index=part.index,
        reasoning="".join(built.reasoning) or None,
        content=content if content or not built.tool_calls else None,
        tool_calls=built.tool_calls,
        token_ids=part.token_ids,
        logprobs=part.logprobs,
        finish_reason=part.finish_reason,
        stop_reason=part.stop_reason,
    )
