"""An engine whose tokens are bytes, so that a test can tell ids, log-probabilities and offsets by heart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import msgspec

from ipc.sampling_params import SamplingParams
from pipeline import Completion, Output
from pipeline.client.outputs import TokenLogprob, Usage
from tests.unit.pipeline.http.fake_engine import CACHED_TOKENS, FakeEngine, FakeStream, ask, text_of

BOS = 256
NAMES = {BOS: b"<s>"}  # of the tokens that are no bytes


class ByteEngine(FakeEngine):
    """Answers each prompt with `pieces`, one Output of a stream each. Sample 1 and later say their number first.

    Each byte of UTF-8 is a token, and its id is the byte.

    Args:
        pieces: texts, or the error that the engine raises there.
        begins_with: special tokens in front of a text.
    """

    def __init__(self, pieces: Sequence[str | Exception] = ("Hello",), begins_with: Sequence[int] = ()) -> None:
        super().__init__(pieces)
        self.begins_with = list(begins_with)
        self.failing: dict[str, Exception] = {}  # prompt: error instead of its first Output
        self.waiting: set[str] = set()  # prompts that the engine never answers
        self.cancelled: list[str] = []  # prompts whose caller has left before the end

    def generate(self, chat: Any, params: SamplingParams, *, stream: bool = False, **options: Any) -> Any:
        self.chats.append(chat)
        self.params.append(params)
        self.options.append(options)
        outputs = self._samples(chat, params)
        return ClosedStream(outputs) if stream else self._joined(outputs, params.n)

    async def tokenize(self, prompt: Any, *, add_special_tokens: bool = True) -> Any:
        self.tokenized.append((prompt, add_special_tokens))
        ids = self._ids(prompt, add_special_tokens)
        return SimpleNamespace(token_ids=ids, token_bytes=[bytes_of(token_id) for token_id in ids])

    def _ids(self, prompt: Any, add_special_tokens: bool = True) -> list[int]:
        if isinstance(prompt, list):
            return prompt
        leading = self.begins_with if isinstance(prompt, str) and add_special_tokens else []
        return [*leading, *text_of(prompt).encode()]

    async def _samples(self, prompt: Any, params: SamplingParams) -> AsyncGenerator[Output]:
        name, has_ended = b"".join(map(bytes_of, self._ids(prompt, False))).decode(), False
        try:
            if name in self.failing:
                raise self.failing[name]
            if name in self.waiting:
                await asyncio.Event().wait()
            async for output in self._said(self._ids(prompt), params):
                has_ended = output.finished
                yield output
        finally:
            if not has_ended and name not in self.failing:
                self.cancelled.append(name)

    async def _said(self, prompt_ids: list[int], params: SamplingParams) -> AsyncGenerator[Output]:
        last, num_generated = len(self.pieces) - 1, 0
        for i, piece in enumerate(self.pieces):
            for sample in range(params.n):
                await asyncio.sleep(0)
                if isinstance(piece, Exception):
                    raise piece
                ids = list((f"{sample}{piece}" if sample and i == 0 else piece).encode())
                num_generated += len(ids)
                output = Output(request_id="r", text=bytes(ids).decode(), token_ids=ids, index=sample)
                if params.num_logprobs is not None:
                    output.logprobs = [row_of(each, params.logprobs or 0, params) for each in ids]
                if i == sample == 0:
                    output.prompt_usage = Usage(len(prompt_ids), 0, CACHED_TOKENS)
                    if params.prompt_logprobs is not None:
                        rows = [row_of(each, params.prompt_logprobs, params) for each in prompt_ids[1:]]
                        output.prompt_logprobs = [None, *rows]
                if i == last:
                    output.finish_reason, output.stop_reason = self.finish_reason, self.stop_reason
                    output.finished = sample == params.n - 1
                if output.finished:
                    output.usage = Usage(len(prompt_ids), num_generated, CACHED_TOKENS)
                yield output

    async def _joined(self, outputs: AsyncGenerator[Output], n: int) -> Output:
        """As the client joins a request's Outputs without streaming."""
        samples: list[list[Output]] = [[] for _ in range(n)]
        prompt_rows = None
        async with aclosing(outputs) as stream:
            async for output in stream:
                samples[output.index].append(output)
                prompt_rows = output.prompt_logprobs or prompt_rows
        return msgspec.structs.replace(
            output, prompt_logprobs=prompt_rows, completions=[whole_of(parts) for parts in samples]
        )


class ClosedStream(FakeStream):
    """A stream that cancels its request when its caller leaves it, as OutputStream does."""

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def bytes_of(token_id: int) -> bytes:
    return NAMES[token_id] if token_id in NAMES else bytes([token_id])


def logprob_of(token_id: int) -> float:
    return -token_id / 128


def row_of(token_id: int, num_top: int, params: SamplingParams) -> TokenLogprob:
    """The likeliest tokens are the first letters of the alphabet."""
    top = {each: logprob_of(each) for each in b"ABCDEFGH"[:num_top]}
    requested = {each: logprob_of(each) for each in params.logprob_token_ids or []}
    named = {each: bytes_of(each) for each in (token_id, *top, *requested)}
    return TokenLogprob(token_id, logprob_of(token_id), top, requested, named)


def whole_of(parts: Sequence[Output]) -> Completion:
    rows = [row for part in parts for row in part.logprobs or []]
    last = parts[-1]
    assert last.finish_reason is not None
    return Completion(
        index=last.index, text="".join(part.text for part in parts), token_ids=[i for p in parts for i in p.token_ids],
        finish_reason=last.finish_reason, stop_reason=last.stop_reason,
        logprobs=None if last.logprobs is None else rows,
    )  # fmt: skip


def events_of(app: Any, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a stream. [DONE] ends it."""
    answer = ask(app, path, {**body, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [msgspec.json.decode(event.removeprefix("data: ")) for event in events]
