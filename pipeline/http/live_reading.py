"""One reading of the engine's state and statistics, for `/live`."""

from __future__ import annotations

import asyncio
import time
from typing import Final, NamedTuple

from pipeline.client.async_client import AsyncClient
from pipeline.client.outputs import EngineStats, Health
from workers.scheduler.config import RECENT_STEPS

MAX_AGE_S: Final = 0.2  # requests within this time get the same reading


class LiveReading(NamedTuple):
    """What the engine answered, and when: us of CLOCK_MONOTONIC."""

    now_us: int
    health: Health
    stats: EngineStats


async def read_engine(client: AsyncClient) -> LiveReading:
    """Ask the engine. Raises EngineUnavailable if it does not answer."""
    health, stats = await asyncio.gather(client.health(), client.stats_with_arrays([RECENT_STEPS]))
    return LiveReading(time.monotonic_ns() // 1_000, health, stats)
