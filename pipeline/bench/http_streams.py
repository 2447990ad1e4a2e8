"""Server-sent event streams from an HTTP server, with as little work in the client as possible.

A client library would cost several times what the server costs, and would share its cores.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

_EVENT: Final = b"data: "


@dataclass(frozen=True)
class Target:
    """A server of OpenAI's API, and the model to name."""

    url: str
    model: str

    def request(self, path: str, body: dict[str, Any]) -> bytes:
        """The bytes of a request on a connection that stays open."""
        text = json.dumps({"model": self.model, **body}).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: {len(text)}"
        return head.encode() + b"\r\n\r\n" + text

    async def connect(self, protocol: type[Stream] | None = None) -> Stream:
        """A new connection."""
        parts = urlsplit(self.url)
        assert parts.hostname is not None, f"{self.url} names a host"
        assert parts.port is not None, f"{self.url} names a port"
        _, stream = await asyncio.get_running_loop().create_connection(protocol or Stream, parts.hostname, parts.port)
        return stream


@dataclass
class Stream(asyncio.Protocol):
    """One connection. Counts events and remembers when the first one of the present answer arrived."""

    num_events: int = 0
    first_event_at: float = 0.0
    answer: bytes = b""  # the beginning of the present answer
    transport: asyncio.Transport = field(init=False)
    on_event: Callable[[float], object] | None = None  # is told the moment of each event
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport), "TCP connections write"
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if not self.first_event_at and _EVENT in data:
            self.first_event_at = time.perf_counter()
            self.begun.set()
        if len(self.answer) < 1_024:
            self.answer += data
        num_events = data.count(_EVENT)
        self.num_events += num_events
        if num_events and self.on_event is not None:
            self.on_event(time.perf_counter())
        if data.endswith(b"0\r\n\r\n"):
            self.ended.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.begun.set()
        self.ended.set()

    def send(self, request: bytes) -> None:
        """Begin a request. The answer before it has ended."""
        self.first_event_at, self.answer = 0.0, b""
        self.begun.clear()
        self.ended.clear()
        self.transport.write(request)

    def check(self) -> None:
        """Raise RuntimeError unless the present answer has status 200."""
        if not self.answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"the server answered {self.answer[:300]!r}")


@contextlib.asynccontextmanager
async def steady_http_streams(
    target: Target, num_streams: int, request: bytes, warm_up_s: float
) -> AsyncIterator[list[Stream]]:
    """Begin the block when all streams have run for `warm_up_s`, and close them at its end.

    When a stream ends, the same connection sends the request again. Raises RuntimeError if an answer is an error.
    """
    streams = [await target.connect() for _ in range(num_streams)]

    async def keep_asking(stream: Stream) -> None:
        while True:
            stream.send(request)
            await stream.begun.wait()
            stream.check()
            await stream.ended.wait()

    tasks = [asyncio.create_task(keep_asking(stream)) for stream in streams]
    try:
        while not all(stream.num_events for stream in streams):
            done, _ = await asyncio.wait(tasks, timeout=0.01, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        await asyncio.sleep(warm_up_s)
        yield streams
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in streams:
            stream.transport.abort()
