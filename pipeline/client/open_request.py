"""Collects what arrives for an open request until its reader takes it, and what is needed to resume the request.

Knows no sockets. Times are of time.monotonic().
"""

from __future__ import annotations

import asyncio
import math
from array import array
from collections import deque
from typing import Final

import msgspec

from ipc.errors import InvalidRequest, RingfeedError
from ipc.messages import FinalOutput, FinishReason, Generate, Resume, ResumedSample
from pipeline.client.inputs import client_frame
from pipeline.client.interruption import Interruption
from pipeline.client.outputs import (
    Completion,
    LogprobPart,
    Output,
    PromptPart,
    Usage,
    last_rows,
    prompt_logprobs,
    token_logprobs,
)

_LEAST_DEADLINE_S: Final = 1e-3  # of a resumed request: a deadline must be positive


class Sample:
    """One sample of a request, with the text and tokens that have arrived and are unread."""

    __slots__ = (
        "_known", "_num_chars", "final", "index", "is_unread", "logprobs", "prompt_logprobs", "prompt_usage", "texts",
        "token_ids", "without_logprob",
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
        self._known = array("i")  # the tokens that were taken, while the sample is open
        self._num_chars = 0  # of the text that was taken, in code points

    @property
    def resumed(self) -> ResumedSample:
        """What has arrived. The engine does not run an ended sample again, so it needs no tokens of it."""
        if self.final is not None:
            return ResumedSample(has_ended=True)
        num_chars = self._num_chars + sum(map(len, self.texts))
        return ResumedSample(token_ids=array("i", [*self._known, *self.token_ids]).tobytes(), num_chars=num_chars)

    @property
    def num_tokens(self) -> int:
        """Number of tokens that have arrived, taken or not, while the sample is open."""
        return len(self._known) + len(self.token_ids)

    def end(self, final: FinalOutput) -> None:
        """The sample has ended. Nothing of it will be asked for again."""
        self.final = final
        del self._known[:]

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
        if self.final is None:
            self._known.fromlist(self.token_ids)
            self._num_chars += len(output.text)
        else:
            output.finish_reason, output.times = self.final.finish_reason, self.final.times
            output.stop_reason = self.final.stop_string or None
        self.texts, self.token_ids, self.logprobs, self.is_unread = [], [], [], False
        return output


class OpenRequest:
    """A request and its samples. Belongs to the client's loop.

    It has `ended` when all its samples have ended, or when it has failed.
    """

    __slots__ = (
        "_num_prompt_logprobs", "_num_suspected", "_prompt_position", "_waiter", "abandoned", "cancelled", "deadline",
        "ended", "error", "interruption", "is_deaf", "is_suspected", "key", "lost", "message", "prompt_usage",
        "request_id", "samples", "unread",
    )  # fmt: skip
    needs_ready: Final = True  # only an engine that is ready or recovering takes it

    def __init__(self, message: Generate) -> None:
        self.message = message
        self.key = self.request_id = message.request_id
        params = message.params
        has_prompt_logprobs = params.prompt_logprobs is not None
        self.samples = [
            Sample(index, has_prompt_logprobs=has_prompt_logprobs and index == 0) for index in range(params.n)
        ]
        self.ended = False
        self.error: RingfeedError | None = None
        self.is_deaf = False  # everything that still arrives is discarded: it is abandoned, or it waits for an engine
        self.abandoned = False  # its reader has gone
        self.cancelled = False  # its caller has cancelled it
        self.lost: FinalOutput | None = None  # the end of a sample that was interrupted while others still run
        self.unread: deque[Sample] = deque()  # samples with unread news, in order of its arrival
        self.deadline = math.inf
        self.interruption: Interruption | None = None  # None: it was not interrupted since its last news
        self.prompt_usage: Usage | None = None  # arrived, taken or not
        self._num_suspected = 0
        self.is_suspected = False  # in this attempt a sample may have ended a process of the engine
        self._num_prompt_logprobs = 0  # positions of the prompt whose log-probabilities have arrived
        self._prompt_position = 0  # the same of the present attempt, which computes them again
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
        """The log-probabilities of the next tokens of the prompt have arrived, with those of a sample.

        Those of positions that arrived before an interruption are dropped.
        """
        num = len(part[0].token_ids) // 4
        self._prompt_position += num
        num_new = self._prompt_position - self._num_prompt_logprobs
        if num_new <= 0:
            return
        self._num_prompt_logprobs = self._prompt_position
        sample = self.samples[index]
        sample.prompt_logprobs.append(part if num_new == num else (last_rows(part[0], num_new), part[1]))
        self._has_news(sample)

    def add_prompt_usage(self, index: int, usage: Usage) -> None:
        """The number of the prompt's tokens has arrived, with a sample's first tokens. A resumed request repeats it."""
        if self.prompt_usage is None:
            self.prompt_usage = self.samples[index].prompt_usage = usage

    def end_sample(self, index: int, final: FinalOutput) -> None:
        """A sample has ended, without an error. The final answer ends all samples that have not ended.

        If a sample was interrupted before, the final answer ends only its own sample: the others can be resumed.
        """
        if self.lost is not None:
            self._end(self.samples[index], final)
            return
        for sample in self.samples if final.num_open == 0 else [self.samples[index]]:
            self._end(sample, final)
        self.ended = final.num_open == 0

    def end_here(self, reason: FinishReason) -> None:
        """End without the engine, with what has arrived."""
        prompt = self.prompt_usage or Usage(0, 0)
        for sample in self.samples:
            self._end(sample, FinalOutput(
                reason, prompt.prompt_tokens, sample.num_tokens, num_cached_tokens=prompt.num_cached_tokens
            ))  # fmt: skip
        self.ended = True

    def sent(self, now: float) -> None:
        """The request was sent for the first time. Its deadline counts from now."""
        if self.message.scheduling.deadline_s is not None:
            self.deadline = now + self.message.scheduling.deadline_s

    def end_attempt(self) -> None:
        """The engine has lost the request, which waits for another attempt."""
        self._num_suspected += self.is_suspected
        self._prompt_position = 0
        self.is_deaf, self.is_suspected, self.lost = True, False, None

    def sent_again(self) -> None:
        """The request was sent again."""
        self.is_deaf = False

    def frame_again(self, now: float) -> bytes:
        """The encoded request for another attempt, which continues behind what has arrived.

        Raises InvalidRequest if prompt and tokens together are too large for one message.
        """
        scheduling = self.message.scheduling
        left_s = None if self.deadline == math.inf else max(self.deadline - now, _LEAST_DEADLINE_S)
        message = msgspec.structs.replace(
            self.message,
            scheduling=msgspec.structs.replace(scheduling, deadline_s=left_s, queue_timeout_s=None),
            resume=Resume(samples=[sample.resumed for sample in self.samples], num_suspected=self._num_suspected),
        )
        return client_frame(message, "prompt and resumed tokens")

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

    def _end(self, sample: Sample, final: FinalOutput) -> None:
        if sample.final is None:
            sample.end(final)
            self._has_news(sample)

    def _has_news(self, sample: Sample) -> None:
        self.interruption = None
        if not sample.is_unread:
            sample.is_unread = True
            self.unread.append(sample)
        if self._waiter is not None:
            self.wake()

    def _usage(self) -> Usage:
        finals = [sample.final for sample in self.samples if sample.final is not None]
        first = max(finals, key=lambda final: final.num_prompt_tokens)  # one that ended here may not know them
        num_completion_tokens = sum(final.num_completion_tokens for final in finals)
        return Usage(first.num_prompt_tokens, num_completion_tokens, first.num_cached_tokens)
