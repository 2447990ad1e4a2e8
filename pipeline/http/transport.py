"""One HTTP request: its body is read, its handler runs, and its answer goes out, whole or as a stream of events.

A client that disconnects cancels the task of its request. The cancellation leaves `AsyncClient.generate`, which cancels
the request in the engine, so no handler needs to watch for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, Protocol

import msgspec
from starlette.datastructures import Headers, QueryParams

from pipeline.http.body_limits import check_num_values
from pipeline.http.errors import Dialect, HttpError, http_error
from pipeline.http.operation import Operation
from pipeline.http.service import Service

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

JSON: Final = "application/json"
MAX_ARRIVING_BODIES: Final = 16  # of the largest size: more bytes may not wait for the rest of their bodies
_BODIES_FULL: Final = HttpError(
    503, "too many large bodies arrive at the same time: send the request again later", code="busy", retry_after_s=1.0
)
SERVER_ENDS: Final = "this server ends before the request is done: send it again once the server is back"
_IS_ANSWERED: Final = "ringfeed.is_answered"  # in the scope: the end of the stream is on its way
_EVENT_STREAM: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect events otherwise
]


@dataclass(frozen=True, kw_only=True)
class Call:
    """A request as a handler sees it.

    Args:
        body: all bytes of the body, at most `http.max_body_bytes`.
        request_id: the client's `X-Request-Id`, or a new one. It goes back in the answer's header.
    """

    service: Service
    method: str
    path_params: Mapping[str, Any]
    headers: Headers
    body: bytes
    request_id: str
    scope: Scope = field(repr=False)

    @cached_property
    def query(self) -> QueryParams:
        """The parameters of the URL's query."""
        return QueryParams(self.scope.get("query_string", b""))


@dataclass(frozen=True)
class Reply:
    """A whole answer. `value` is bytes as they are, or anything else as JSON."""

    value: Any
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    content_type: str = JSON


class Closable(Protocol):
    """An async iterator that can be closed early: an async generator, or the client's OutputStream."""

    def __aiter__(self) -> AsyncIterator[Any]: ...
    def __anext__(self) -> Awaitable[Any]: ...
    async def aclose(self) -> None: ...


def _as_it_is(item: Any) -> Any:
    return item


@dataclass(frozen=True)
class EventStream:
    """An answer of server-sent events, each with its field names and the empty line at its end.

    The status line waits for the first event: a request that fails earlier is answered with the status of its error.

    Args:
        items: of the stream. They are read as fast as the client reads events, and closed at the end.
        write: makes the event of an item, or several; b"" = none. A function instead of a generator around `items`,
            because a generator costs time for each token.
    """

    items: Closable
    write: Callable[[Any], bytes] = _as_it_is
    headers: Mapping[str, str] = field(default_factory=dict)


Handler = Callable[[Call], Awaitable[Reply | EventStream]]


class Endpoint:
    """A handler as an ASGI application."""

    def __init__(self, handler: Handler, dialect: Dialect, operation: Operation) -> None:
        self.handler = handler
        self.dialect = dialect
        self.operation = operation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service: Service = scope["app"].state.service
        try:
            body = await _read_body(receive, Headers(scope=scope), service)
            if body and self.operation.body is not None:
                await check_num_values(body, service.config, service.large_bodies)
        except HttpError as error:
            await self._send_error(error, send)
            return
        except asyncio.CancelledError:
            await self._end_early(scope, send)
            raise
        if body is None:  # the client left before it had sent everything
            service.stats.num_disconnects[0] += 1
            return
        call = Call(
            service=service, method=scope["method"], path_params=scope.get("path_params", {}),
            headers=Headers(scope=scope), body=body, request_id=scope["request_id"], scope=scope,
        )  # fmt: skip
        work = asyncio.current_task()
        assert work is not None, "an ASGI application runs in a task"
        watcher = asyncio.ensure_future(_cancel_on_disconnect(receive, work, scope))
        with service.open_request() if self.operation.generates else contextlib.nullcontext():
            try:
                await self._answer(call, send)
            except asyncio.CancelledError:
                work.uncancel()
                if watcher.done() and not watcher.cancelled():
                    service.note_disconnect(scope)
                else:
                    await self._end_early(scope, send)
            finally:
                watcher.cancel()

    async def _answer(self, call: Call, send: Send) -> None:
        try:
            reply = await self.handler(call)
            if isinstance(reply, Reply):
                await _send_whole(reply, send)
                return
        except Exception as error:
            await self._send_error(as_http_error(error, call), send)
            return
        try:
            await self._stream(reply, call, send)
        finally:
            await reply.items.aclose()

    async def _stream(self, reply: EventStream, call: Call, send: Send) -> None:
        try:
            first = b""
            while not first:
                first = reply.write(await anext(reply.items))
        except Exception as error:
            await self._send_error(as_http_error(error, call), send)
            return
        with call.service.open_stream():
            # In a task of its own, an event resumes the few coroutines below, and not those of the middleware too.
            await asyncio.create_task(self._send_events(reply, first, call, send))

    async def _send_events(self, reply: EventStream, first: bytes, call: Call, send: Send) -> None:
        headers = [*_EVENT_STREAM, *_encoded(reply.headers)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        send = call.scope["send"]  # past the middleware, which only looks at the start of an answer
        num_events, write = call.service.stats.num_stream_events, reply.write
        event = {"type": "http.response.body", "body": first, "more_body": True}
        try:
            await send(event)
            num_events[0] += 1
            async for item in reply.items:
                if body := write(item):
                    event["body"] = body
                    await send(event)
                    num_events[0] += 1
        except Exception as error:
            event["body"] = self.dialect.error_event(as_http_error(error, call))
            await send(event)
        call.scope[_IS_ANSWERED] = True
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _end_early(self, scope: Scope, send: Send) -> None:
        """The server ends while a request is open: its client gets an error instead of a broken connection."""
        error = HttpError(503, SERVER_ENDS, code="unavailable", retry_after_s=1.0)
        if "status" not in scope:  # the answer has not begun
            await self._send_error(error, send)
        elif _IS_ANSWERED not in scope:
            await send({"type": "http.response.body", "body": self.dialect.error_event(error), "more_body": False})

    async def _send_error(self, error: HttpError, send: Send) -> None:
        await _send_whole(Reply(self.dialect.error_body(error), error.status, error.headers), send)


def as_http_error(error: Exception, call: Call) -> HttpError:
    """The answer for any error of a request. The log gets an error that nobody raises on purpose."""
    known = http_error(error)
    if known is not None:
        return known
    logger.error("request %s to %s failed", call.request_id, call.scope["path"], exc_info=error)
    return HttpError(500, f"internal error; the log has it under request id {call.request_id}")


async def _send_whole(reply: Reply, send: Send) -> None:
    body = reply.value if isinstance(reply.value, bytes) else msgspec.json.encode(reply.value)
    headers = [
        (b"content-type", reply.content_type.encode()),
        (b"content-length", str(len(body)).encode()),
        *_encoded(reply.headers),
    ]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in headers.items()]


async def _read_body(receive: Receive, headers: Headers, service: Service) -> bytes | None:
    """The whole body; None if the client has left.

    Raises HttpError 413 without reading further, and 503 if the bodies that are arriving take too much memory.
    """
    max_bytes = service.config.max_body_bytes
    too_large = HttpError(
        413, f"the body has more than {max_bytes:,} bytes: send less, or raise http.max_body_bytes of the server"
    )
    length = headers.get("content-length", "")
    if length.isdigit() and int(length[:20]) > max_bytes:
        raise too_large
    parts: list[bytes] = []
    size = 0
    try:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            service.num_arriving_bytes += len(part)
            if size > max_bytes:
                raise too_large
            parts.append(part)
            if not message.get("more_body"):
                return parts[0] if len(parts) == 1 else b"".join(parts)
            if service.num_arriving_bytes > MAX_ARRIVING_BODIES * max_bytes:
                raise _BODIES_FULL
    finally:
        service.num_arriving_bytes -= size


async def _cancel_on_disconnect(receive: Receive, work: asyncio.Task[Any], scope: Scope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    if _IS_ANSWERED not in scope:  # uvicorn says "disconnect" after a complete answer too
        work.cancel()
