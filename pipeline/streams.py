"""A client's open requests and the async iterator over one of them. Knows no sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Self

from ipc.errors import RingfeedError
from ipc.messages import Final as FinalAnswer
from ipc.messages import TokenLogprobs
from pipeline.outputs import Output, Usage, token_logprobs


class OpenRequest:
    """A request, and what has arrived of it that nobody has read. Belongs to the client's loop.

    It has `ended` with a final answer, an error, or both.
    """

    __slots__ = ("_waiter", "abandoned", "error", "final", "logprobs", "request_id", "texts", "token_ids")

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.final: FinalAnswer | None = None
        self.error: RingfeedError | None = None
        self.abandoned = False  # its reader has left: what still arrives is dropped
        self._waiter: asyncio.Future[None] | None = None  # its reader, asleep

    @property
    def ended(self) -> bool:
        return self.final is not None or self.error is not None

    @property
    def has_unread(self) -> bool:
        return bool(self.token_ids or self.texts)

    def wake(self) -> None:
        """Tell the reader, if it sleeps, that there is news."""
        if self._waiter is not None:
            if not self._waiter.done():
                self._waiter.set_result(None)
            self._waiter = None

    def fail(self, error: RingfeedError) -> None:
        self.error = error
        self.wake()

    async def news(self, loop: asyncio.AbstractEventLoop) -> None:
        """Sleep until `wake()`. One reader at a time."""
        assert self._waiter is None or self._waiter.done(), f"request {self.request_id} has two readers"
        self._waiter = loop.create_future()
        await self._waiter

    def take(self) -> Output:
        """All that is unread, as one Output; the last one if the request has ended without error."""
        output = Output(request_id=self.request_id, text="".join(self.texts), token_ids=self.token_ids)
        if self.logprobs:
            output.logprobs = token_logprobs(self.token_ids, self.logprobs)
        self.texts, self.token_ids, self.logprobs = [], [], []
        if self.final is not None and self.error is None:
            output.finished = True
            output.finish_reason = self.final.finish_reason
            final = self.final
            output.usage = Usage(final.num_prompt_tokens, final.num_completion_tokens, final.num_cached_tokens)
        return output


class OutputStream:
    """The Outputs of one request, as they come.

    Dropping it, `aclose()`, or leaving its `async with` block cancels the request if it has not ended. A request that
    fails raises its error, after what had arrived before.
    """

    def __init__(
        self, request: OpenRequest, abandon: Callable[[OpenRequest], None], loop: asyncio.AbstractEventLoop
    ) -> None:
        self._request = request
        self._abandon = abandon
        self._loop = loop
        self._exhausted = False

    @property
    def request_id(self) -> str:
        return self._request.request_id

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Output:
        output = await self.next()
        if output is None:
            raise StopAsyncIteration
        return output

    async def next(self) -> Output | None:
        """The next Output; None after the last, or after `aclose()`."""
        request = self._request
        while not self._exhausted and not request.has_unread and not request.ended:
            await request.news(self._loop)
        if self._exhausted:
            return None
        if request.error is not None and not request.has_unread:
            self._exhausted = True
            raise request.error
        output = request.take()
        self._exhausted = output.finished
        return output

    async def aclose(self) -> None:
        self._exhausted = True
        self._abandon(self._request)
        self._request.wake()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # Whoever drops it may be another thread (the synchronous client's), or the collector in any.
        if not self._request.ended:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the client with it
                self._loop.call_soon_threadsafe(self._abandon, self._request)
