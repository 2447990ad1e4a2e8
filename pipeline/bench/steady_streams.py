"""Keeps a fixed number of streams running on an engine while a benchmark measures it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

from pipeline import AsyncClient, SamplingParams

_LOOK_S: Final = 0.01

WaitUntil = Callable[[Callable[[], bool]], Awaitable[None]]


@asynccontextmanager
async def steady_streams(
    client: AsyncClient,
    num_seqs: int,
    params_of: Callable[[int], SamplingParams],
    warm_up_s: float,
    on_output: Callable[[int], None] = lambda _: None,
) -> AsyncIterator[WaitUntil]:
    """Begin the block when all streams have run for `warm_up_s`, and cancel them at its end.

    When a stream ends, by its own or at the model's length, a new one replaces it. `params_of` gives the parameters of
    each, by its place; `on_output` is told of each output, by the same place. The block gets a function that waits for
    a condition, and raises the error of a stream that has failed.
    """
    begun: set[int] = set()

    async def stream(index: int) -> None:
        while True:
            async for _ in client.generate("The for statement", params_of(index), stream=True):
                begun.add(index)
                on_output(index)

    async def wait_until(condition: Callable[[], bool]) -> None:
        while not condition():
            done, _ = await asyncio.wait(tasks, timeout=_LOOK_S, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()

    tasks = [asyncio.create_task(stream(i)) for i in range(num_seqs)]
    try:
        await wait_until(lambda: len(begun) == num_seqs)
        await asyncio.sleep(warm_up_s)
        yield wait_until
    finally:  # also after Ctrl-C, before the client is closed under them
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
