"""`/v1/completions`: texts or token ids in, their continuations out, whole or as a stream of chunks.

Choice `i * n + s` is sample `s` of prompt `i`. The prompts of one request run at the same time; if one fails, the
others are cancelled.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

import msgspec

from pipeline.client.outputs import Completion, Output, TokenLogprob, Usage
from pipeline.http.bodies import read_body
from pipeline.http.generation.chat_run import RunUsage
from pipeline.http.generation.endings import finish_reason
from pipeline.http.generation.sampling_fields import answer_id
from pipeline.http.openai.completion_body import NEUTRAL, CompletionBody, CompletionRequest, Prompt, read_request
from pipeline.http.openai.completion_logprobs import LogprobWriter, joined
from pipeline.http.openai.completion_prompts import PreparedPrompt, prepare
from pipeline.http.openai.wire import DONE, StreamOptions, prompt_logprobs_value, usage_value
from pipeline.http.service import Service, new_id
from pipeline.http.tracing import note_sample, note_usage
from pipeline.http.transport import Call, EventStream, Reply

T = TypeVar("T")

_encode: Final = msgspec.json.Encoder().encode


async def create(call: Call) -> Reply | EventStream:
    """Continue the prompts."""
    body = read_body(call.body, CompletionBody, neutral=NEUTRAL)
    service = call.service
    model = service.check_model(body.model)
    request = read_request(call, body)
    prompts = await _gathered([prepare(service, request, prompt) for prompt in request.prompts])
    request = replace(request, prompts=[prompt.source for prompt in prompts])
    head = {
        "id": answer_id("cmpl-", body),
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
    }
    choices = [
        [Choice(i * request.params.n + sample, request, body, prompts[i]) for sample in range(request.params.n)]
        for i in range(len(request.prompts))
    ]
    if body.stream:
        # With one prompt there is nothing to merge, and each token saves a pass through a queue.
        stream = _stream(service, request, 0) if len(request.prompts) == 1 else _merged(service, request)
        return EventStream(stream, _ChunkWriter(request, choices, head, body.stream_options or StreamOptions()).write)
    outputs = await _gathered([_whole(service, request, prompt) for prompt in request.prompts])
    values = [
        choice.whole(sample, output.prompt_logprobs)
        for output, of_prompt in zip(outputs, choices, strict=True)
        for choice, sample in zip(of_prompt, output.completions, strict=True)
    ]
    usage = _sum_usage([output.usage for output in outputs], request)
    note_usage(usage.prompt_tokens, usage.completion_tokens)
    return Reply({**head, "choices": values, "usage": usage_value(usage)})


@dataclass
class Choice:
    """One choice of the answer. It writes a whole one, or the chunks of one."""

    index: int
    request: CompletionRequest
    body: CompletionBody
    prompt: PreparedPrompt
    num_tokens: int = 0
    _has_begun: bool = False
    _logprobs: LogprobWriter = field(init=False)

    def __post_init__(self) -> None:
        scores_prompt = self.request.echo and self.request.logprobs is not None
        self._logprobs = LogprobWriter(
            self.request.logprobs or 0,
            as_ids=bool(self.body.return_tokens_as_token_ids),
            offset=-self.prompt.num_hidden_chars if scores_prompt else len(self.prompt.text),
        )

    def whole(self, sample: Completion, prompt_rows: list[TokenLogprob | None] | None) -> dict[str, Any]:
        """The choice of a request without streaming."""
        value = self.chunk(sample, prompt_rows)
        if self.body.prompt_logprobs is not None and prompt_rows is not None:
            value["prompt_logprobs"] = prompt_logprobs_value(prompt_rows, self.body.prompt_logprobs)
        return value

    def chunk(self, new: Output | Completion, prompt_rows: list[TokenLogprob | None] | None) -> dict[str, Any]:
        """What is new. The first chunk begins with the prompt, if the answer repeats it."""
        value: dict[str, Any] = {"index": self.index, "text": new.text, "logprobs": None}
        rows: Sequence[TokenLogprob] | None = new.logprobs
        if not self.request.generates:
            value["text"], rows = "", rows and []
        logprobs = None
        if not self._has_begun:
            self._has_begun = True
            value["text"] = self.prompt.text + value["text"]
            if self.request.shows_token_ids:
                value["prompt_token_ids"] = self.prompt.token_ids
            if self.request.echo and self.request.logprobs is not None and prompt_rows is not None:
                logprobs = self._logprobs.write(prompt_rows, self.prompt.first_token)
        value["logprobs"] = joined(logprobs, None if rows is None else self._logprobs.write(rows))
        self.num_tokens += len(new.token_ids)
        value["finish_reason"] = value["stop_reason"] = None
        if new.finish_reason is not None:
            note_sample(new.times)
            reason, stop = finish_reason(new.finish_reason, new.stop_reason, has_tokens=self.num_tokens > 0)
            value["finish_reason"], value["stop_reason"] = (
                (reason, stop) if self.request.generates else ("length", None)
            )
        if self.request.shows_token_ids:
            value["token_ids"] = new.token_ids if self.request.generates else []
        return value


async def _gathered(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all. An error of one cancels the others."""
    if len(works) == 1:
        return [await works[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def _whole(service: Service, request: CompletionRequest, prompt: Prompt) -> Output:
    return await service.client.generate(
        prompt, request.params, request_id=new_id("cmpl-"), cache_salt=request.cache_salt,
        scheduling=request.scheduling,
    )  # fmt: skip


class _ChunkWriter:
    """Writes the chunks of one request, one server-sent event each."""

    def __init__(
        self, request: CompletionRequest, choices: list[list[Choice]], head: dict[str, Any], options: StreamOptions
    ) -> None:
        self._request = request
        self._choices = choices
        self._head = head
        self._options = options
        self._begin = b"data: " + _encode(head)[:-1] + b',"choices":['
        self._end = b'],"usage":null}\n\n' if options.include_usage else b"]}\n\n"
        self._usages: list[Usage | None] = [None] * len(request.prompts)  # so far
        self._num_generated = 0
        self._num_open = len(request.prompts)

    def write(self, item: tuple[int, Output]) -> bytes:
        """The chunk of an Output of prompt `i`; b"" if it has no news. The last Output ends the stream."""
        i, output = item
        self._num_generated += len(output.token_ids)
        if output.usage is not None or output.prompt_usage is not None:
            self._usages[i] = output.usage or output.prompt_usage
        chunk = self._choices[i][output.index].chunk(output, output.prompt_logprobs)
        has_news = chunk["text"] or chunk["logprobs"] or chunk["finish_reason"]
        if self._request.shows_token_ids:
            has_news = has_news or chunk["token_ids"] or "prompt_token_ids" in chunk
        event = self._begin + _encode(chunk) + self._ending() if has_news else b""
        if output.usage is None:
            return event
        self._num_open -= 1
        return event if self._num_open else event + self._final()

    def _ending(self) -> bytes:
        if not self._options.continuous_usage_stats:
            return self._end
        usage = _sum_usage(self._usages, self._request)
        usage.completion_tokens = self._num_generated if self._request.generates else 0
        return b'],"usage":' + _encode(usage_value(usage)) + b"}\n\n"

    def _final(self) -> bytes:
        usage = _sum_usage(self._usages, self._request)
        note_usage(usage.prompt_tokens, usage.completion_tokens)
        if not self._options.include_usage:
            return DONE
        return b"data: " + _encode({**self._head, "choices": [], "usage": usage_value(usage)}) + b"\n\n" + DONE


async def _stream(service: Service, request: CompletionRequest, i: int) -> AsyncGenerator[tuple[int, Output]]:
    """The Outputs of prompt `i`. None comes before all scores of the prompt, if the answer repeats them."""
    stream = service.client.generate(
        request.prompts[i], request.params, stream=True, request_id=new_id("cmpl-"), cache_salt=request.cache_salt,
        scheduling=request.scheduling,
    )  # fmt: skip
    waits = request.echo and request.logprobs is not None
    held: list[Output] = []
    rows: list[TokenLogprob | None] = []
    async with stream:
        async for output in stream:
            if not waits:
                output.prompt_logprobs = rows or output.prompt_logprobs  # a sample may begin only now
                yield i, output
                continue
            held.append(output)
            rows += output.prompt_logprobs or []
            if output.index == 0 and (output.token_ids or output.finish_reason is not None):
                waits = False
                for each in held:
                    each.prompt_logprobs = rows
                    yield i, each
    assert not waits, "sample 0 has ended"


async def _merged(service: Service, request: CompletionRequest) -> AsyncGenerator[tuple[int, Output]]:
    """The Outputs of all prompts as they arrive. An error of one ends the others."""
    queue: asyncio.Queue[tuple[int, Output] | BaseException | None] = asyncio.Queue(maxsize=len(request.prompts))

    async def read(i: int) -> None:
        try:
            async for item in _stream(service, request, i):
                await queue.put(item)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.ensure_future(read(i)) for i in range(len(request.prompts))]
    try:
        num_open = len(tasks)
        while num_open:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _sum_usage(usages: Sequence[Usage | None], request: CompletionRequest) -> RunUsage:
    known = [usage for usage in usages if usage is not None]
    return RunUsage.of(
        sum(usage.prompt_tokens for usage in known),
        sum(usage.completion_tokens for usage in known) if request.generates else 0,
        sum(usage.num_cached_tokens for usage in known),
    )
