"""Runs the requests of a batch, as many at a time as the engine accepts. Knows neither sockets nor prompts."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Generic, TypeVar

from ipc.errors import EngineUnavailable, QueueFull, RingfeedError
from pipeline.client.backoff import FIRST_PAUSE_S, LONGEST_PAUSE_S, jittered

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class Batch(Generic[Request, Answer]):
    """Runs requests, at most `window` at a time, and fewer while the engine's queue is full.

    `ask(request)` runs a request and returns its answer. After QueueFull it is called again; any other RingfeedError
    becomes the result. `settle(request, result)` is called once for each request; an error that it raises ends the
    batch. `pause` sleeps, and raises EngineUnavailable when the client is closed. The batch takes a request from
    `requests` only when a worker runs it, so its memory does not grow with their number.

    A worker task parks when a full queue refuses its request. The others go on, because each request that ends makes
    room for another. After the refusal's `retry_after_s`, the batch resumes one worker, then two, four and so on, until
    the next refusal. So a batch of any size tests a full queue with one request at a time.
    """

    def __init__(
        self,
        ask: Callable[[Request], Awaitable[Answer]],
        requests: Iterable[Request],
        window: int,
        *,
        pause: Callable[[float], Awaitable[None]],
        settle: Callable[[Request, Answer | RingfeedError], None],
    ) -> None:
        self._ask = ask
        self._requests = iter(requests)
        self._refused: deque[Request] = deque()  # they are asked again before further ones
        self._has_more = True  # whether `requests` may hold further ones
        self._num_asked = 0  # requests without a result that are not in `_refused`
        self._window = max(1, window)
        self._pause = pause
        self._settle = settle
        self._num_parked = 0
        self._was_refused = False  # since workers were last resumed
        self._pause_s = 0.0
        self._next_at = 0.0  # when the next workers may be resumed, by the loop's clock
        self._resumer: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Returns when every request has its result. Raises what `settle` and `requests` raise."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self._num_parked = self._window
                self._resume(self._window)
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _work(self) -> None:
        for request in iter(self._next, None):
            result: Answer | RingfeedError
            try:
                result = await self._ask(request)
            except QueueFull as error:
                self._num_asked -= 1
                self._refused.appendleft(request)
                self._has_more = True
                self._park(error.retry_after_s)
                return
            except RingfeedError as error:
                result = error
            self._num_asked -= 1
            self._settle(request, result)
            if isinstance(result, EngineUnavailable):  # all other requests would fail in the same way
                self._settle_rest(result)
            elif not self._was_refused:
                self._resume(1)
        if self._num_asked == 0 and self._resumer is not None:  # there is nothing left to resume a worker for
            self._resumer.cancel()

    def _next(self) -> Request | None:
        """The next request, which counts as asked; None if none is left for now."""
        request = self._refused.popleft() if self._refused else next(self._requests, None)
        self._has_more = request is not None
        self._num_asked += self._has_more
        return request

    def _park(self, retry_after_s: float) -> None:
        self._num_parked += 1
        if retry_after_s > 0:
            self._pause_s = retry_after_s
        elif not self._was_refused:  # the first since workers were resumed
            self._pause_s = min(LONGEST_PAUSE_S, max(FIRST_PAUSE_S, 2 * self._pause_s))
        self._was_refused = True
        self._delay()
        if self._resumer is None:
            self._resumer = self._tasks.create_task(self._resume_parked())

    def _delay(self) -> None:
        self._next_at = asyncio.get_running_loop().time() + jittered(self._pause_s)

    async def _resume_parked(self) -> None:
        """Resume parked workers, more each time, until no worker is parked or no request is left."""
        num = 1
        while self._num_parked and self._has_more:
            while (left_s := self._next_at - asyncio.get_running_loop().time()) > 0:
                try:
                    await self._pause(left_s)
                except EngineUnavailable as error:
                    self._settle_rest(error)
                    break
            num = 1 if self._was_refused else 2 * num
            self._was_refused = False
            self._delay()
            self._resume(num)
        self._resumer, self._pause_s = None, 0.0

    def _resume(self, num: int) -> None:
        for _ in range(min(num, self._num_parked)):
            self._num_parked -= 1
            self._tasks.create_task(self._work())

    def _settle_rest(self, error: RingfeedError) -> None:
        for request in iter(self._next, None):
            self._num_asked -= 1
            self._settle(request, error)
