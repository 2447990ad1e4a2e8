"""Collects what arrives for an open request, and iterates over it: `OutputStream`. Knows no sockets."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Callable
from typing import Self

from ipc.errors import InvalidRequest, RingfeedError, error_from_code
from ipc.messages import FinalOutput
from ipc.sampling_params import SamplingParams
from pipeline.client.outputs import (
    Completion,
    LogprobPart,
    Output,
    PromptPart,
    Usage,
    prompt_logprobs,
    token_logprobs,
)
from pipeline.environment import forks


class Sample:
    """One sample of a request, with the text and tokens that have arrived and are unread."""

    __slots__ = (
        "final", "index", "is_unread", "logprobs", "prompt_logprobs", "prompt_usage", "texts", "token_ids",
        "without_logprob",
    )  # fmt: skip

    def __init__(self, index: int, *, has_prompt_logprobs: bool = False) -> None:
        self.index = index
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[LogprobPart] = []
        self.prompt_logprobs: list[PromptPart] = []
        # The prompt's first token, before it is taken. It has no log-probability.
        self.without_logprob: list[None] = [None] if has_prompt_logprobs else []
        self.prompt_usage: Usage | None = None  # arrived and not taken
        self.final: FinalOutput | None = None
        self.is_unread = False

    def take(self, request_id: str) -> Output:
        """Take everything unread as one Output."""
        output = Output(request_id=request_id, index=self.index, text="".join(self.texts), token_ids=self.token_ids)
        if self.logprobs:
            output.logprobs = token_logprobs(self.token_ids, self.logprobs)
        if self.prompt_usage is not None:
            output.prompt_usage, self.prompt_usage = self.prompt_usage, None
        if self.prompt_logprobs or self.without_logprob:
            output.prompt_logprobs = [*self.without_logprob, *prompt_logprobs(self.prompt_logprobs)]
            self.prompt_logprobs, self.without_logprob = [], []
        if self.final is not None:
            output.finish_reason, output.times = self.final.finish_reason, self.final.times
            output.stop_reason = self.final.stop_string or None
        self.texts, self.token_ids, self.logprobs, self.is_unread = [], [], [], False
        return output


class OpenRequest:
    """A request and its samples. Belongs to the client's loop.

    It has `ended` when all its samples have ended, or when it has failed.
    """

    __slots__ = ("_waiter", "abandoned", "ended", "error", "request_id", "samples", "unread")

    def __init__(self, request_id: str, params: SamplingParams) -> None:
        self.request_id = request_id
        has_prompt_logprobs = params.prompt_logprobs is not None
        self.samples = [
            Sample(index, has_prompt_logprobs=has_prompt_logprobs and index == 0) for index in range(params.n)
        ]
        self.ended = False
        self.error: RingfeedError | None = None
        self.abandoned = False  # its reader has gone: everything that still arrives is discarded
        self.unread: deque[Sample] = deque()  # samples with unread news, in order of its arrival
        self._waiter: asyncio.Future[None] | None = None  # its reader, asleep

    def wake(self) -> None:
        """Wake the reader, if it sleeps."""
        if self._waiter is not None:
            if not self._waiter.done() and not self._waiter.get_loop().is_closed():
                self._waiter.set_result(None)
            self._waiter = None

    def add(self, index: int, text: str, token_ids: list[int]) -> None:
        """New text and tokens of a sample have arrived; both are empty if the sample only ends. Keeps `token_ids`."""
        if text or token_ids:
            sample = self.samples[index]
            if text:
                sample.texts.append(text)
            if sample.token_ids:
                sample.token_ids += token_ids
            else:
                sample.token_ids = token_ids
            self._has_news(sample)

    def add_prompt_logprobs(self, index: int, part: PromptPart) -> None:
        """The log-probabilities of the next tokens of the prompt have arrived, with those of a sample."""
        sample = self.samples[index]
        sample.prompt_logprobs.append(part)
        self._has_news(sample)

    def end_sample(self, index: int, final: FinalOutput) -> None:
        """A sample has ended. The final answer ends all samples that have not ended."""
        if final.finish_reason == "error":
            self.fail(error_from_code(final.error_code, final.error_message, final.retry_after_s))
            return
        for sample in self.samples if final.num_open == 0 else [self.samples[index]]:
            if sample.final is None:
                sample.final = final
                self._has_news(sample)
        self.ended = final.num_open == 0

    def fail(self, error: RingfeedError) -> None:
        self.error = error
        self.ended = True
        self.wake()

    def take_error(self) -> RingfeedError:
        """Take the error, to raise it. The request does not keep it.

        A raised error holds the frames that it passes, and these hold the request. If the request kept its error, each
        refusal would be a reference cycle, and an overloaded client would stop for garbage collections.
        """
        assert self.error is not None, f"request {self.request_id} has not failed"
        error, self.error = self.error, None
        return error

    async def news(self, loop: asyncio.AbstractEventLoop) -> None:
        """Sleep until `wake()`. Raises InvalidRequest on another loop, or if another reader already sleeps."""
        if self._waiter is not None and not self._waiter.done():
            raise InvalidRequest(
                f"the stream of request {self.request_id} is being read by another task or thread: use one reader"
            )
        self._waiter = loop.create_future()
        try:
            await self._waiter
        except (
            RuntimeError
        ):  # the future is of another loop; asking for the running loop first would cost a system call
            self._waiter = None
            raise InvalidRequest(
                f"the stream of request {self.request_id} belongs to another event loop: read it there"
            ) from None

    def take(self) -> Output:
        """Take everything unread of one sample. The last Output of a request without error is `finished`."""
        output = self.unread.popleft().take(self.request_id)
        if self.ended and self.error is None and not self.unread:
            output.finished, output.usage = True, self._usage()
        return output

    def take_whole(self) -> Output:
        """Take everything as one Output. The request has ended without error, and nothing of it was read."""
        outputs = [sample.take(self.request_id) for sample in self.samples]
        whole = outputs[0]
        whole.finished, whole.usage = True, self._usage()
        for output in outputs:
            assert output.finish_reason is not None, f"sample {output.index} of {self.request_id} has not ended"
            whole.completions.append(
                Completion(
                    index=output.index,
                    text=output.text,
                    token_ids=output.token_ids,
                    finish_reason=output.finish_reason,
                    stop_reason=output.stop_reason,
                    logprobs=output.logprobs,
                    times=output.times,
                )
            )
        return whole

    def _has_news(self, sample: Sample) -> None:
        if not sample.is_unread:
            sample.is_unread = True
            self.unread.append(sample)
        if self._waiter is not None:
            self.wake()

    def _usage(self) -> Usage:
        finals = [sample.final for sample in self.samples if sample.final is not None]
        first = finals[0]
        num_completion_tokens = sum(final.num_completion_tokens for final in finals)
        return Usage(first.num_prompt_tokens, num_completion_tokens, first.num_cached_tokens)


class OutputStream:
    """An async iterator over the Outputs of one request, from `AsyncClient.generate(..., stream=True)`.

    Dropping it, `aclose()`, or leaving its `async with` block cancels the request if it has not ended. A failed request
    raises its error after the Outputs that arrived before. The stream belongs to the event loop and the process that
    opened it. A reader elsewhere, or a second reader at the same time, gets InvalidRequest.
    """

    def __init__(
        self, request: OpenRequest, abandon: Callable[[OpenRequest], None], loop: asyncio.AbstractEventLoop
    ) -> None:
        self._request = request
        self._abandon = abandon
        self._loop = loop
        self._generation = forks.generation
        self._pid = os.getpid()
        self._exhausted = False

    @property
    def request_id(self) -> str:
        """The id of the request, for `cancel()`."""
        return self._request.request_id

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Output:
        request = self._request  # no further coroutine is called: each costs time for each token
        if self._generation != forks.generation:
            raise InvalidRequest(
                f"the stream of request {request.request_id} was opened by process {self._pid}, before a fork: "
                "open one in this process"
            )
        while not (self._exhausted or request.unread or request.ended):
            await request.news(self._loop)
        if self._exhausted:
            raise StopAsyncIteration
        if request.error is not None and not request.unread:
            self._exhausted = True
            raise request.take_error()
        output = request.take()
        self._exhausted = output.finished
        return output

    async def next(self) -> Output | None:
        """The next Output; None after the last, or after `aclose()`."""
        return await anext(self, None)

    async def aclose(self) -> None:
        """Cancel the request if it has not ended. A second call does nothing."""
        if self._generation == forks.generation and self._loop is asyncio.get_running_loop():
            self._close()
        else:
            self.close_soon()

    def close_soon(self) -> None:
        """Like `aclose()`, from any thread and without waiting. In a forked child it does nothing."""
        if self._generation == forks.generation:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the client with it
                self._loop.call_soon_threadsafe(self._close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # Another thread may drop the stream (that of a synchronous client), or the garbage collector in any thread.
        if not self._request.ended and self._generation == forks.generation:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the client with it
                self._loop.call_soon_threadsafe(self._abandon, self._request)

    def _close(self) -> None:
        self._exhausted = True
        self._abandon(self._request)
        self._request.wake()
