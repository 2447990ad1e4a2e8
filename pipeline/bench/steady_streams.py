"""Keeps a fixed number of streams running on an engine while a benchmark measures it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from pipeline import AsyncClient, SamplingParams


@asynccontextmanager
async def steady_streams(
    client: AsyncClient, num_seqs: int, params_of: Callable[[int], SamplingParams], warm_up_s: float
) -> AsyncIterator[None]:
    """Begin the block when all streams have run for `warm_up_s`, and cancel them at its end.

    When a stream ends, by its own or at the model's length, a new one replaces it. `params_of` gives the parameters of
    each, by its place.
    """
    begun: set[int] = set()

    async def stream(index: int) -> None:
        while True:
            async for _ in client.generate("The for statement", params_of(index), stream=True):
                begun.add(index)

    tasks = [asyncio.create_task(stream(i)) for i in range(num_seqs)]
    try:
        while len(begun) < num_seqs:
            done, _ = await asyncio.wait(tasks, timeout=0.01, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        await asyncio.sleep(warm_up_s)
        yield
    finally:  # also after Ctrl-C, before the client is closed under them
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
