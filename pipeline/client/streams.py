"""Iterates over what arrives for one request: `OutputStream`. Knows no sockets."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from typing import Self

from ipc.errors import InvalidRequest
from pipeline.client.open_request import OpenRequest
from pipeline.client.outputs import Output
from pipeline.environment import forks


class OutputStream:
    """An async iterator over the Outputs of one request, from `AsyncClient.generate(..., stream=True)`.

    Dropping it, `aclose()`, or leaving its `async with` block cancels the request if it has not ended. A failed request
    raises its error after the Outputs that arrived before. The stream belongs to the event loop and the process that
    opened it. A reader elsewhere, or a second reader at the same time, gets InvalidRequest.
    """

    def __init__(
        self, request: OpenRequest, abandon: Callable[[OpenRequest], None], loop: asyncio.AbstractEventLoop
    ) -> None:
        self._request = request
        self._abandon = abandon
        self._loop = loop
        self._generation = forks.generation
        self._pid = os.getpid()
        self._exhausted = False

    @property
    def request_id(self) -> str:
        """The id of the request, for `cancel()`."""
        return self._request.request_id

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Output:
        request = self._request  # no further coroutine is called: each costs time for each token
        if self._generation != forks.generation:
            raise InvalidRequest(
                f"the stream of request {request.request_id} was opened by process {self._pid}, before a fork: "
                "open one in this process"
            )
        while not (self._exhausted or request.unread or request.ended):
            await request.news(self._loop)
        if self._exhausted:
            raise StopAsyncIteration
        if request.error is not None and not request.unread:
            self._exhausted = True
            raise request.take_error()
        output = request.take()
        self._exhausted = output.finished
        return output

    async def next(self) -> Output | None:
        """The next Output; None after the last, or after `aclose()`."""
        return await anext(self, None)

    async def aclose(self) -> None:
        """Cancel the request if it has not ended. A second call does nothing."""
        if self._generation == forks.generation and self._loop is asyncio.get_running_loop():
            self._close()
        else:
            self.close_soon()

    def close_soon(self) -> None:
        """Like `aclose()`, from any thread and without waiting. In a forked child it does nothing."""
        if self._generation == forks.generation:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the client with it
                self._loop.call_soon_threadsafe(self._close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # Another thread may drop the stream (that of a synchronous client), or the garbage collector in any thread.
        if not self._request.ended and self._generation == forks.generation:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the client with it
                self._loop.call_soon_threadsafe(self._abandon, self._request)

    def _close(self) -> None:
        self._exhausted = True
        self._abandon(self._request)
        self._request.wake()
