"""The HTTP application in front of a fake engine, called without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar

import httpx2
import msgspec
from starlette.applications import Starlette

from pipeline.http.app import make_app
from pipeline.http.config import COUNTERS, HttpConfig
from pipeline.http.generation.defaults import SamplingDefaults
from pipeline.http.generation.reasoning_start import ReasoningStart
from pipeline.http.parsing.formats import OutputFormat
from pipeline.http.service import Service
from tests.unit.pipeline.http.fake_engine import FakeEngine

ClientT = TypeVar("ClientT")
T = TypeVar("T")


def service_of(engine: FakeEngine, format: OutputFormat | None = None, config: HttpConfig | None = None) -> Service:
    """What an HTTP process knows of an engine whose model "m" has this output format."""
    client: Any = engine
    format = format or OutputFormat()
    return Service(
        client=client, config=config or HttpConfig(port=0), model_names=("m",), model_folder="", max_model_len=64,
        format=format, reasoning_start=ReasoningStart(client, format.reasoning_tags), template_reads_tools=True,
        defaults=SamplingDefaults({}), stats=SimpleNamespace(**{name: [0] for name in COUNTERS}),
    )  # fmt: skip


def app_of(engine: FakeEngine, format: OutputFormat | None = None, keys: Sequence[str] = ()) -> Starlette:
    return make_app(service_of(engine, format), keys)


def request(app: Starlette, method: str, path: str, **options: Any) -> httpx2.Response:
    """Send one request, and wait for the whole answer."""

    async def send() -> httpx2.Response:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test") as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


def ask(app: Starlette, path: str, body: Any, headers: dict[str, str] | None = None) -> httpx2.Response:
    """The answer to a POST request."""
    return request(app, "POST", path, json=body, headers=headers)


def events_of(answer: httpx2.Response) -> list[dict[str, Any]]:
    """The values of OpenAI's events. A named event bears the type of its value, and [DONE] ends the stream."""
    assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    values = []
    for event in events:
        *names, data = event.split("\n")
        values.append(msgspec.json.decode(data.removeprefix("data: ")))
        assert names == ([f"event: {values[-1]['type']}"] if names else [])
    return values


def stream_of(app: Starlette, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream."""
    return events_of(ask(app, path, {**body, "stream": True}))


def use_client(app: Starlette, make: Callable[..., ClientT], use: Callable[[ClientT], Awaitable[T]]) -> T:
    """The result of `use` with an official asynchronous client, made by `make`, with the key "k"."""

    async def run() -> T:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app)) as http_client:
            return await use(make(api_key="k", http_client=http_client, max_retries=0))

    return asyncio.run(run())
