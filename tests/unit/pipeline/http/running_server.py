"""The server on a real socket, with one endpoint at /."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.middleware import Middleware
from starlette.routing import Route

from pipeline.http.app import Application, Bookkeeping
from pipeline.http.config import HttpConfig
from pipeline.http.errors import OPENAI
from pipeline.http.listener import open_listener
from pipeline.http.operation import Operation
from pipeline.http.server import Server
from pipeline.http.service import Service
from pipeline.http.transport import Call, Endpoint, Handler, Reply
from tests.unit.pipeline.http.application import service_of
from tests.unit.pipeline.http.fake_engine import FakeEngine

DEADLINE_S = 10.0


@dataclass
class Running:
    """A server, its counters, and what its clients do."""

    port: int
    service: Service
    server: Server
    task: asyncio.Task[None]

    @property
    def stats(self) -> Any:
        return self.service.stats

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 24)

    async def ask(self, body: bytes = b"{}", headers: bytes = b"") -> bytes:
        """Send a request on a new connection that is closed after it, and return everything that comes back."""
        reader, writer = await self.connect()
        with contextlib.closing(writer):
            writer.write(request(body, headers + b"connection: close\r\n"))
            return await asyncio.wait_for(reader.read(), DEADLINE_S)

    async def stop(self) -> None:
        """Stop the server as its process does: it lets open requests finish for a while."""
        self.server.should_exit = True
        await asyncio.wait_for(self.task, DEADLINE_S)

    async def cut(self) -> None:
        """End the server at once. `stop` takes 0.2 s even if nothing is open."""
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task
        for each in self.server.servers:
            each.close()
        for connection in list(self.server.server_state.connections):
            connection.transport.abort()  # type: ignore[union-attr]


def request(body: bytes = b"{}", headers: bytes = b"") -> bytes:
    return b"POST / HTTP/1.1\r\nhost: here\r\n%bcontent-length: %d\r\n\r\n%b" % (headers, len(body), body)


@contextlib.asynccontextmanager
async def serve(handler: Handler, **settings: Any) -> AsyncIterator[Running]:
    config = HttpConfig(port=0, **settings)
    service = service_of(FakeEngine(), config=config)
    app = Application(
        routes=[Route("/", Endpoint(handler, OPENAI, Operation(generates=True)), methods=["POST"])],
        middleware=[Middleware(Bookkeeping)],
    )
    app.state.service = service
    with open_listener(config) as listener:
        server = Server(app, config, service.stats)
        task = asyncio.create_task(server.run_on(listener))
        running = Running(listener.getsockname()[1], service, server, task)
        await eventually(lambda: server.started)
        try:
            yield running
        finally:
            if not task.done():
                await running.cut()


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.005)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())  # type: ignore[arg-type]


async def echo(call: Call) -> Reply:
    return Reply({"size": len(call.body)})


async def until_cancelled(cancelled: asyncio.Event) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        cancelled.set()
