"""A client of an engine that says what a test has written for it, and the application in front of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from types import SimpleNamespace
from typing import Any

import httpx
from starlette.applications import Starlette

from ipc.sampling_params import SamplingParams
from pipeline import Chat, Completion, Output
from pipeline.client.outputs import Usage
from pipeline.http.app import make_app
from pipeline.http.config import COUNTERS, HttpConfig
from pipeline.http.generation.defaults import SamplingDefaults
from pipeline.http.generation.reasoning_start import ReasoningStart
from pipeline.http.parsing.formats import OutputFormat
from pipeline.http.service import Service

CACHED_TOKENS = 2


class FakeEngine:
    """Answers each request with `pieces`: one Output of a stream each, one token each, sample 0 alone.

    A prompt has one token for each character of its text, or of the texts of its messages. An exception among the
    pieces is raised there.
    """

    def __init__(self, pieces: Sequence[str | Exception] = ("Hello",)) -> None:
        self.pieces = pieces
        self.finish_reason: Any = "stop"
        self.stop_reason: str | None = None
        self.chats: list[Chat] = []
        self.params: list[SamplingParams] = []
        self.options: list[dict[str, Any]] = []
        self.tokenized: list[tuple[Any, bool]] = []

    def generate(self, chat: Chat, params: SamplingParams, *, stream: bool = False, **options: Any) -> Any:
        self.chats.append(chat)
        self.params.append(params)
        self.options.append(options)
        return FakeStream(self._outputs(chat)) if stream else self._whole(chat)

    async def tokenize(self, prompt: Any, *, add_special_tokens: bool = True) -> Any:
        self.tokenized.append((prompt, add_special_tokens))
        text = text_of(prompt)
        return SimpleNamespace(token_ids=list(range(len(text))), token_bytes=[each.encode() for each in text])

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))

    async def _outputs(self, chat: Chat) -> AsyncGenerator[Output]:
        size, last = len(text_of(chat)), len(self.pieces) - 1
        for i, piece in enumerate(self.pieces):
            await asyncio.sleep(0)
            if isinstance(piece, Exception):
                raise piece
            output = Output(request_id="r", text=piece, token_ids=[i])
            if i == 0:
                output.prompt_usage = Usage(size, 0, CACHED_TOKENS)
            if i == last:
                output.finished, output.usage = True, Usage(size, len(self.pieces), CACHED_TOKENS)
                output.finish_reason, output.stop_reason = self.finish_reason, self.stop_reason
            yield output

    async def _whole(self, chat: Chat) -> Output:
        text, token_ids, output = "", [], None
        async for output in self._outputs(chat):
            text += output.text
            token_ids += output.token_ids
        assert output is not None
        output.completions = [
            Completion(
                index=0, text=text, token_ids=token_ids, finish_reason=self.finish_reason, stop_reason=self.stop_reason
            )
        ]
        return output


class FakeStream:
    """As OutputStream."""

    def __init__(self, outputs: AsyncGenerator[Output]) -> None:
        self._outputs = outputs

    async def __aenter__(self) -> FakeStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

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


def app_of(engine: FakeEngine, format: OutputFormat | None = None, keys: Sequence[str] = ()) -> Starlette:
    """The application, for a model "m" with this output format."""
    format = format or OutputFormat()
    client: Any = engine
    service = Service(
        client=client, config=HttpConfig(port=0), model_names=("m",), model_folder="", max_model_len=64, format=format,
        reasoning_start=ReasoningStart(client, format.reasoning_tags), template_reads_tools=True,
        defaults=SamplingDefaults({}), stats=SimpleNamespace(**{name: [0] for name in COUNTERS}),
    )  # fmt: skip
    return make_app(service, keys)


def ask(app: Starlette, path: str, body: Any, headers: dict[str, str] | None = None) -> httpx.Response:
    """The answer to a POST request."""

    async def post() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.post(path, json=body, headers=headers)

    return asyncio.run(post())
