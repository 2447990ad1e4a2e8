"""Runs the requests of a batch, as many at a time as the engine accepts. Knows neither sockets nor prompts."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

from ipc.errors import EngineUnavailable, QueueFull, RingfeedError
from pipeline.client.outputs import Output

_FIRST_PAUSE_S: Final = 0.1  # after a refusal without `retry_after_s`; doubled for each further refusal
_LONGEST_PAUSE_S: Final = 2.0
_JITTER: Final = 0.25  # share of a pause that is random, so that clients refused together do not retry together


class Batch:
    """Runs `count` requests, at most `window` at a time, and fewer while the engine's queue is full.

    `ask(i)` runs request i and returns its Output. After QueueFull it is called again; any other error becomes the
    result. `pause` sleeps, and raises EngineUnavailable when the client is closed. `advance` is called for each result.

    A worker task parks when a full queue refuses its request. The others go on, because each request that ends makes
    room for another. After the refusal's `retry_after_s`, the batch resumes one worker, then two, four and so on, until
    the next refusal. So a batch of any size tests a full queue with one request at a time.
    """

    def __init__(
        self,
        ask: Callable[[int], Awaitable[Output]],
        count: int,
        window: int,
        *,
        pause: Callable[[float], Awaitable[None]],
        advance: Callable[[], None],
    ) -> None:
        self._ask = ask
        self._count = count
        self._window = min(count, max(1, window))
        self._pause = pause
        self._advance = advance
        self._waiting = deque(range(count))
        self._results: dict[int, Output | RingfeedError] = {}
        self._num_parked = 0
        self._was_refused = False  # since workers were last resumed
        self._pause_s = 0.0
        self._next_at = 0.0  # when the next workers may be resumed, by the loop's clock
        self._resumer: asyncio.Task[None] | None = None

    async def run(self) -> list[Output | RingfeedError]:
        """All answers, in order."""
        async with asyncio.TaskGroup() as self._tasks:
            self._num_parked = self._window
            self._resume(self._window)
        return [self._results[index] for index in range(self._count)]

    async def _work(self) -> None:
        while self._waiting:
            index = self._waiting.popleft()
            try:
                self._settle(index, await self._ask(index))
            except QueueFull as error:
                self._waiting.appendleft(index)
                self._park(error.retry_after_s)
                return
            except RingfeedError as error:
                self._settle(index, error)
                if isinstance(error, EngineUnavailable):  # all other requests would fail in the same way
                    self._settle_rest(error)
            else:
                if not self._was_refused:
                    self._resume(1)

    def _park(self, retry_after_s: float) -> None:
        self._num_parked += 1
        if retry_after_s > 0:
            self._pause_s = retry_after_s
        elif not self._was_refused:  # the first since workers were resumed
            self._pause_s = min(_LONGEST_PAUSE_S, max(_FIRST_PAUSE_S, 2 * self._pause_s))
        self._was_refused = True
        self._delay()
        if self._resumer is None:
            self._resumer = self._tasks.create_task(self._resume_parked())

    def _delay(self) -> None:
        self._next_at = asyncio.get_running_loop().time() + self._pause_s * random.uniform(1.0, 1.0 + _JITTER)

    async def _resume_parked(self) -> None:
        """Resume parked workers, more each time, until no worker is parked or no request is left."""
        num = 1
        while self._num_parked and self._waiting:
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

    def _settle(self, index: int, result: Output | RingfeedError) -> None:
        self._results[index] = result
        self._advance()
        if len(self._results) == self._count and self._resumer is not None:
            self._resumer.cancel()

    def _settle_rest(self, error: RingfeedError) -> None:
        while self._waiting:
            self._settle(self._waiting.popleft(), error)
