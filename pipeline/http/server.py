"""uvicorn on the socket that the launcher opened, with bounds on what a connection may cost.

uvicorn itself limits neither the size of headers nor the time that a client takes to send a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator
from typing import Any, Final

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pipeline.http.config import HttpConfig

MAX_HEADER_BYTES: Final = 64 << 10
MAX_HEADERS: Final = 256  # of one request, trailers included
MIN_BODY_BYTES_PER_S: Final = 4 << 10  # a client that sends less is cut off
_STOP_TIMEOUT_S: Final = 1
_TOO_LARGE: Final = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: text/plain; charset=utf-8\r\n"
    b"content-length: 22\r\nconnection: close\r\n\r\nthe headers are large\n"
)


class Connection(HttpToolsProtocol):
    """One connection. It is closed if a request arrives too slowly, or if its headers or framing are too large.

    Subclasses set `settings` and `stats`, because uvicorn makes the instances.
    """

    settings: HttpConfig
    stats: Any

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if len(self.connections) >= self.settings.max_connections:
            self.stats.num_connections_refused[0] += 1
            transport.abort()
            self.transport = transport
            return
        super().connection_made(transport)
        self.stats.num_connections[0] = len(self.connections)
        self._is_refused = False
        self._num_received = 0  # bytes of the present request: headers, framing and body
        self._num_body = 0
        self._in_headers = True
        self._deadline: asyncio.TimerHandle | None = None
        self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.flow is None:  # it was refused
            return
        self._stop_deadline()
        super().connection_lost(exc)
        self.stats.num_connections[0] = len(self.connections)

    def data_received(self, data: bytes) -> None:
        if self.flow is None or self._is_refused:
            return
        self._num_received += len(data)
        super().data_received(data)
        if self._is_refused:
            return
        overhead = self._num_received - self._num_body
        if self._in_headers and overhead > MAX_HEADER_BYTES:
            self._refuse_headers()
        elif overhead > 2 * self.settings.max_body_bytes:  # chunks of a byte each, or trailers without end
            self._is_refused = True
            self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._num_received = self._num_body = 0
        self._in_headers = True
        if self._deadline is None:
            self._expect_request()

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS or len(name) + len(value) > MAX_HEADER_BYTES:
            self._refuse_headers()
            raise ValueError("the headers are too large")

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self.stats.num_requests[0] += 1
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_body += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._stop_deadline()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        if not self._is_refused:
            super().send_400_response(msg)

    def _refuse_headers(self) -> None:
        if not self._is_refused:
            self._is_refused = True
            self.stats.num_headers_too_large[0] += 1
            self.transport.write(_TOO_LARGE)
            self.transport.close()

    def _expect_request(self) -> None:
        self._num_body_before = 0
        self._deadline = self.loop.call_later(self.settings.receive_timeout_s, self._check_pace)

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _check_pace(self) -> None:
        """Close the connection unless the body has arrived at the least pace since the last look."""
        pace = (self._num_body - self._num_body_before) / self.settings.receive_timeout_s
        if self._in_headers or pace < MIN_BODY_BYTES_PER_S:
            self.stats.num_header_timeouts[0] += 1
            self._is_refused = True
            self.transport.close()
            return
        self._num_body_before = self._num_body
        self._deadline = self.loop.call_later(self.settings.receive_timeout_s, self._check_pace)


class Server(uvicorn.Server):
    """Serves `app` on a listening socket until `should_exit` is set. Leaves signals to the process."""

    def __init__(self, app: Any, settings: HttpConfig, stats: Any) -> None:
        connection = type("Connection", (Connection,), {"settings": settings, "stats": stats})
        super().__init__(
            uvicorn.Config(
                app, loop="none", http=connection, ws="none", lifespan="off", log_config=None, access_log=False,
                server_header=False, proxy_headers=False, timeout_keep_alive=max(1, int(settings.receive_timeout_s)),
                timeout_graceful_shutdown=_STOP_TIMEOUT_S, ssl_certfile=settings.tls_cert, ssl_keyfile=settings.tls_key,
            )
        )  # fmt: skip
        # Its warnings are about clients that do not speak HTTP, and about ours that it cancels at the end.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)

    async def run_on(self, listener: socket.socket) -> None:
        """Serve. The socket stays open: other processes accept on it too."""
        await self.serve(sockets=[listener])

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
