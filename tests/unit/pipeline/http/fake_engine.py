"""A client of an engine that says what a test has written for it.

Its tokens are bytes and a few special tokens, so that a test can tell ids, log-probabilities and offsets by heart.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import msgspec

from ipc.errors import InvalidRequest
from ipc.sampling_params import SamplingParams
from pipeline import Chat, Completion, Output
from pipeline.client.outputs import TokenLogprob, Usage
from pipeline.http.parsing.formats import OutputFormat

CACHED_TOKENS = 2
BOS, THINK, END_THINK = SPECIAL_IDS = (256, 257, 258)
SPECIAL = dict(zip(SPECIAL_IDS, (b"<s>", b"<think>", b"</think>"), strict=True))
_IDS = {name: token_id for token_id, name in SPECIAL.items()}
_TOKEN = re.compile(b"|".join(map(re.escape, _IDS)) + b"|.", re.DOTALL)

THINKING = OutputFormat("hermes", "think", False, ("<think>", "</think>"), THINK, END_THINK)

Pieces = Sequence[str | Exception]


class FakeEngine:
    """Answers each prompt with `pieces`: one Output of a stream each. Sample 1 and later say their number first.

    `script` says what the next request gets instead. A token of a prompt is a byte of its text, or of the texts of its
    messages.

    Args:
        pieces: texts, or the error that the engine raises there.
        begins_with: special tokens in front of a text.
    """

    def __init__(self, pieces: Pieces = ("Hello",), begins_with: Sequence[int] = ()) -> None:
        self.pieces = pieces
        self.finish_reason: Any = "stop"
        self.stop_reason: str | None = None
        self.begins_with = list(begins_with)
        self.scripts: deque[tuple[Pieces, Any]] = deque()  # pieces and finish reason of each coming request
        self.failing: dict[str, Exception] = {}  # prompt: error instead of its first Output
        self.waiting: set[str] = set()  # prompts that the engine never answers
        self.kept: dict[str, bytes] = {}
        self.max_kept_bytes = 1 << 20

        self.chats: list[Any] = []
        self.params: list[SamplingParams] = []
        self.options: list[dict[str, Any]] = []
        self.tokenized: list[tuple[Any, bool]] = []
        self.cancelled: list[str] = []  # prompts whose caller has left before the end

    def script(self, *pieces: str | Exception, finish_reason: str = "stop") -> None:
        """Set the answer of the first request that has no script yet."""
        self.scripts.append((pieces, finish_reason))

    def generate(self, chat: Any, params: SamplingParams, *, stream: bool = False, **options: Any) -> Any:
        self.chats.append(chat)
        self.params.append(params)
        self.options.append(options)
        outputs = self._samples(chat, params)
        return FakeStream(outputs) if stream else self._joined(outputs, params.n)

    async def tokenize(self, prompt: Any, *, add_special_tokens: bool = True) -> Any:
        self.tokenized.append((prompt, add_special_tokens))
        ids = self._ids(prompt, add_special_tokens)
        return SimpleNamespace(token_ids=ids, token_bytes=[bytes_of(token_id) for token_id in ids])

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return text_of_ids(token_ids)

    async def keep(self, key: str, value: bytes) -> None:
        if len(value) > self.max_kept_bytes:
            raise InvalidRequest("value is too large")
        self.kept[key] = value

    async def recall(self, key: str) -> bytes | None:
        return self.kept.get(key)

    async def forget(self, key: str) -> bool:
        return self.kept.pop(key, None) is not None

    def _ids(self, prompt: Any, add_special_tokens: bool = True) -> list[int]:
        if isinstance(prompt, list):
            return prompt
        leading = self.begins_with if isinstance(prompt, str) and add_special_tokens else []
        return [*leading, *ids_of(text_of(prompt))]

    async def _samples(self, prompt: Any, params: SamplingParams) -> AsyncGenerator[Output]:
        name, has_ended = text_of_ids(self._ids(prompt, False)), False
        pieces, finish_reason = self.scripts.popleft() if self.scripts else (self.pieces, self.finish_reason)
        try:
            if name in self.failing:
                raise self.failing[name]
            if name in self.waiting:
                await asyncio.Event().wait()
            async for output in self._said(pieces, finish_reason, self._ids(prompt), params):
                has_ended = output.finished
                yield output
        finally:
            if not has_ended and name not in self.failing:
                self.cancelled.append(name)

    async def _said(
        self, pieces: Pieces, finish_reason: Any, prompt_ids: list[int], params: SamplingParams
    ) -> AsyncGenerator[Output]:
        last, num_generated = len(pieces) - 1, 0
        for i, piece in enumerate(pieces):
            for sample in range(params.n):
                await asyncio.sleep(0)
                if isinstance(piece, Exception):
                    raise piece
                text = f"{sample}{piece}" if sample and i == 0 else piece
                ids = ids_of(text)
                num_generated += len(ids)
                output = Output(request_id="r", text=text, token_ids=ids, index=sample)
                if params.num_logprobs is not None:
                    output.logprobs = [row_of(each, params.logprobs or 0, params) for each in ids]
                if i == sample == 0:
                    output.prompt_usage = Usage(len(prompt_ids), 0, CACHED_TOKENS)
                    if params.prompt_logprobs is not None:
                        rows = [row_of(each, params.prompt_logprobs, params) for each in prompt_ids[1:]]
                        output.prompt_logprobs = [None, *rows]
                if i == last:
                    output.finish_reason, output.stop_reason = finish_reason, self.stop_reason
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


class FakeStream:
    """As OutputStream: it cancels its request when its caller leaves it."""

    def __init__(self, outputs: AsyncGenerator[Output]) -> None:
        self._outputs = outputs

    async def __aenter__(self) -> FakeStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __aiter__(self) -> FakeStream:
        return self

    async def __anext__(self) -> Output:
        return await anext(self._outputs)

    async def aclose(self) -> None:
        await self._outputs.aclose()


def text_of(prompt: Any) -> str:
    """The text of a prompt: of a chat, that of its messages."""
    if not isinstance(prompt, Chat):
        return str(prompt)
    texts = []
    for message in prompt.messages:
        content = message["content"] or ""
        texts += [content] if isinstance(content, str) else [part["text"] for part in content]
    return "".join(texts)


def ids_of(text: str) -> list[int]:
    return [_IDS[token] if token in _IDS else token[0] for token in _TOKEN.findall(text.encode())]


def bytes_of(token_id: int) -> bytes:
    return SPECIAL[token_id] if token_id in SPECIAL else bytes([token_id])


def text_of_ids(token_ids: Sequence[int]) -> str:
    return b"".join(map(bytes_of, token_ids)).decode()


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
