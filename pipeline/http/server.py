"""uvicorn on the socket that the launcher opened, with bounds on what a connection may cost.

uvicorn itself limits neither the size of headers nor the time that a client takes to send a request or to read an
answer. It also does not tell a request of its client's leave if further requests wait behind it on the connection.

A client that closes its sending side has left: TCP does not tell this from a closed connection until the server sends
more, and a request of a client that is gone must not keep its place in the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator
from typing import Any, Final

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from pipeline.http.config import HttpConfig

MAX_HEADER_BYTES: Final = 64 << 10
MAX_HEADERS: Final = 256  # of one request, trailers included
MIN_BODY_BYTES_PER_S: Final = 4 << 10  # a client that sends less is cut off
MAX_PIPELINED: Final = 16  # requests of a connection that wait for the answer to the one before them
_STOP_TIMEOUT_S: Final = 1
_FRAMING: Final = (b"content-length", b"transfer-encoding")
_TOO_LARGE: Final = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: text/plain; charset=utf-8\r\n"
    b"content-length: 22\r\nconnection: close\r\n\r\nthe headers are large\n"
)


class Connection(HttpToolsProtocol):
    """One connection. It is closed if a request arrives or an answer leaves too slowly, if headers or framing are too
    large, or if too many requests wait behind the present one.

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
        self._send_deadline: asyncio.TimerHandle | None = None
        self._repeats_head = False
        self._present: RequestResponseCycle | None = None  # the request that is being answered
        self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.flow is None:  # it was refused
            return
        self._stop_deadline()
        self._stop_send_deadline()
        super().connection_lost(exc)
        if self._present is not None and not self._present.response_complete:
            self._present.disconnected = True
            self._present.message_event.set()
        self.stats.num_connections[0] = len(self.connections)

    def data_received(self, data: bytes) -> None:
        if self.flow is None or self._is_refused:
            return
        self._num_received += len(data)
        self._feed(data)
        if self._is_refused:
            return
        overhead = self._num_received - self._num_body
        if self._in_headers and overhead > MAX_HEADER_BYTES:
            self._refuse_headers()
        elif overhead > 2 * self.settings.max_body_bytes:  # chunks of a byte each, or trailers without end
            self._is_refused = True
            self._close()

    def _feed(self, data: bytes) -> None:
        """Parse. A request to change the protocol is ignored, as HTTP allows: Java's client sends one each time.

        The parser stops at the end of such a request's headers. A new one goes on at its body. It learns from a
        head of its own how long the body is.
        """
        self._unset_keepalive_if_required()
        try:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                self.parser = httptools.HttpRequestParser(self)
                self._repeats_head = True
                framing = (b"%b: %b\r\n" % each for each in self.headers if each[0] in _FRAMING)
                self.parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % b"".join(framing))
                self._repeats_head = False
                if rest := data[upgrade.args[0] :]:
                    self._feed(rest)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")

    def on_message_begin(self) -> None:
        if self._repeats_head:
            return
        super().on_message_begin()
        self._num_received = self._num_body = 0
        self._in_headers = True
        if self._deadline is None:
            self._expect_request()

    def on_url(self, url: bytes) -> None:
        if not self._repeats_head:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._repeats_head:
            return
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS or len(name) + len(value) > MAX_HEADER_BYTES:
            self._refuse_headers()
            raise ValueError("the headers are too large")

    def on_headers_complete(self) -> None:
        if self._repeats_head:
            return
        self._in_headers = False
        self.stats.num_requests[0] += 1
        super().on_headers_complete()
        if self.pipeline:
            # uvicorn would read nothing until the present answer is complete, and so not notice if the client leaves.
            self.flow.resume_reading()
            if len(self.pipeline) > MAX_PIPELINED:
                self._is_refused = True
                self._close()
                raise ValueError("too many requests wait")  # ends the parsing of what has arrived

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._present = cycle
        super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        self._num_body += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # the body follows
        self._stop_deadline()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if self.transport.is_closing():
            self._watch_reader()
        super().on_response_complete()

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        self._stop_send_deadline()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        if not self._is_refused:
            super().send_400_response(msg)
            self._watch_reader()

    def _refuse_headers(self) -> None:
        if not self._is_refused:
            self._is_refused = True
            self.stats.num_headers_too_large[0] += 1
            self.transport.write(_TOO_LARGE)
            self._close()

    def _expect_request(self) -> None:
        self._num_body_before = 0
        self._deadline = self.loop.call_later(self.settings.receive_timeout_s, self._check_pace)

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _close(self) -> None:
        """Close the connection once everything is sent, or once the client reads nothing of it."""
        self.transport.close()
        self._watch_reader()

    def _watch_reader(self) -> None:
        """Something is unsent, and nothing more will be written before it is sent."""
        self._num_unsent = self.transport.get_write_buffer_size()
        if self._num_unsent and self._send_deadline is None:
            self._send_deadline = self.loop.call_later(self.settings.receive_timeout_s, self._check_reader)

    def _stop_send_deadline(self) -> None:
        if self._send_deadline is not None:
            self._send_deadline.cancel()
            self._send_deadline = None

    def _check_reader(self) -> None:
        """Abort the connection if the client has read nothing since the last look."""
        self._send_deadline = None
        num_before = self._num_unsent
        self._watch_reader()
        if 0 < num_before <= self._num_unsent:
            self.stats.num_send_timeouts[0] += 1
            self.transport.abort()

    def _check_pace(self) -> None:
        """Close the connection unless the body has arrived at the least pace since the last look."""
        if self.flow.read_paused:  # not the client is slow: its body waits for the request before it
            self._deadline = self.loop.call_later(self.settings.receive_timeout_s, self._check_pace)
            return
        pace = (self._num_body - self._num_body_before) / self.settings.receive_timeout_s
        if self._in_headers or pace < MIN_BODY_BYTES_PER_S:
            self.stats.num_header_timeouts[0] += 1
            self._is_refused = True
            self._close()
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
