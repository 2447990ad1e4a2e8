"""The HTTP application on an engine's client that answers with texts which a test has written."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx

from ipc.errors import InvalidRequest, RingfeedError
from ipc.sampling_params import SamplingParams
from pipeline.client.outputs import Completion, Output, TokenLogprob, Usage
from pipeline.http.app import make_app
from pipeline.http.config import COUNTERS, HttpConfig
from pipeline.http.generation.defaults import SamplingDefaults
from pipeline.http.generation.reasoning_start import ReasoningStart
from pipeline.http.parsing.formats import OutputFormat
from pipeline.http.service import Service

TOKEN = TokenLogprob(5, -0.5, {5: -0.5, 6: -1.5}, token_bytes={5: b"a", 6: b"\xc3"})
PLAIN = OutputFormat()
TAGS = {"<think>": 1, "</think>": 2}
THINKING = OutputFormat(
    tool_parser="hermes", reasoning_parser="think", reasoning_tags=("<think>", "</think>"),
    reasoning_begin_id=1, reasoning_end_id=2,
)  # fmt: skip


@dataclass
class Script:
    """One answer: a token for each text, and how it ends."""

    texts: Sequence[str]
    finish_reason: Any = "stop"
    error: RingfeedError | None = None  # after the texts


@dataclass
class ScriptedClient:
    """Stands for `AsyncClient`. Each request takes the next script, and the client records it."""

    scripts: deque[Script] = field(default_factory=deque)
    requests: list[SimpleNamespace] = field(default_factory=list)
    kept: dict[str, bytes] = field(default_factory=dict)
    max_kept_bytes: int = 1 << 20

    def generate(self, prompt: Any, params: SamplingParams, *, stream: bool = False, **options: Any) -> Any:
        self.requests.append(SimpleNamespace(prompt=prompt, params=params, **options))
        script = self.scripts.popleft()
        outputs = self._outputs(script, has_logprobs=params.logprobs is not None)
        return _Stream(outputs) if stream else self._whole(outputs)

    async def _whole(self, outputs: AsyncIterator[Output]) -> Output:
        parts = [output async for output in outputs]
        whole = Completion(
            index=0, text="".join(part.text for part in parts), token_ids=[part.token_ids[0] for part in parts],
            finish_reason=parts[-1].finish_reason,
        )  # type: ignore[arg-type]  # fmt: skip
        return Output(
            request_id="r", text=whole.text, token_ids=whole.token_ids, finished=True,
            finish_reason=whole.finish_reason, usage=parts[-1].usage, completions=[whole],
        )  # fmt: skip

    async def _outputs(self, script: Script, *, has_logprobs: bool) -> AsyncIterator[Output]:
        last = len(script.texts) - 1
        usage = Usage(prompt_tokens=7, completion_tokens=len(script.texts), num_cached_tokens=3)
        for i, text in enumerate(script.texts):
            ends = i == last and script.error is None
            yield Output(
                request_id="r", text=text, token_ids=[TAGS.get(text, 5)], logprobs=[TOKEN] if has_logprobs else None,
                finished=ends, finish_reason=script.finish_reason if ends else None, usage=usage if ends else None,
            )  # fmt: skip
        if script.error is not None:
            raise script.error

    async def keep(self, key: str, value: bytes) -> None:
        if len(value) > self.max_kept_bytes:
            raise InvalidRequest("value is too large")
        self.kept[key] = value

    async def recall(self, key: str) -> bytes | None:
        return self.kept.get(key)

    async def forget(self, key: str) -> bool:
        return self.kept.pop(key, None) is not None

    async def tokenize(self, prompt: Any) -> Any:
        texts = [message["content"] for message in prompt.messages]
        return SimpleNamespace(
            token_ids=list(range(len("".join(texts)))), token_bytes=[b"".join(t.encode() for t in texts)]
        )


class _Stream:
    """A streamed request as `AsyncClient.generate` returns it."""

    def __init__(self, outputs: AsyncIterator[Output]) -> None:
        self._outputs = outputs

    async def __aenter__(self) -> _Stream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._outputs.aclose()  # type: ignore[attr-defined]

    def __aiter__(self) -> AsyncIterator[Output]:
        return self._outputs


class Server:
    """The application, called without a socket."""

    def __init__(self, format: OutputFormat = PLAIN) -> None:
        self.client = ScriptedClient()
        engine: Any = self.client
        self.service = Service(
            client=engine, config=HttpConfig(), model_names=("m",), model_folder="", max_model_len=100, format=format,
            reasoning_start=ReasoningStart(engine, format.reasoning_tags), template_reads_tools=True,
            defaults=SamplingDefaults({}), stats=SimpleNamespace(**{name: [0] for name in COUNTERS}),
        )  # fmt: skip
        self.app = make_app(self.service, [])

    def ask(self, method: str, path: str, **request: Any) -> httpx.Response:
        """Send one request, and wait for the whole answer."""

        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://server/v1/") as http:
                return await http.request(method, path, **request)

        return asyncio.run(send())

    def script(self, *texts: str, finish_reason: str = "stop", error: RingfeedError | None = None) -> None:
        """The engine's next answer: one token for each text."""
        self.client.scripts.append(Script(texts, finish_reason, error))

    def create(self, *texts: str, finish_reason: str = "stop", **body: Any) -> dict[str, Any]:
        """A response to which the engine answers with these texts."""
        self.script(*texts, finish_reason=finish_reason)
        answer = self.ask("POST", "responses", json={"input": "Hi", **body})
        assert answer.status_code == 200, answer.text
        value: dict[str, Any] = answer.json()
        return value

    def refused(self, status: int = 400, **body: Any) -> dict[str, Any]:
        """The error of a request that the engine never gets."""
        num_requests = len(self.client.requests)
        answer = self.ask("POST", "responses", json={"input": "Hi", **body})
        assert answer.status_code == status, answer.text
        assert len(self.client.requests) == num_requests
        error: dict[str, Any] = answer.json()["error"]
        return error

    def stream(
        self, *texts: str, finish_reason: str = "stop", error: RingfeedError | None = None, **body: Any
    ) -> list[dict[str, Any]]:
        """The events of a streamed response. Each is named after its type, and [DONE] ends the stream."""
        self.script(*texts, finish_reason=finish_reason, error=error)
        answer = self.ask("POST", "responses", json={"input": "Hi", "stream": True, **body})
        assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
        *frames, done, rest = answer.text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        events = []
        for frame in frames:
            name, data = frame.split("\n")
            events.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {events[-1]['type']}"
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        return events

    @property
    def messages(self) -> list[Any]:
        """The messages of the engine's last request."""
        return list(self.client.requests[-1].prompt.messages)

    @property
    def params(self) -> SamplingParams:
        """The parameters of the engine's last request."""
        params: SamplingParams = self.client.requests[-1].params
        return params
