"""Runs this project's engine on a given work, once per call: launches it, warms it up, measures, and stops it."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

from pipeline.bench.workload import (
    WARM_UP_OUTPUT_LEN,
    WARM_UP_SEED,
    MixedRun,
    Run,
    Work,
    make_prompts,
    poisson_arrivals,
    run_all,
    run_mixed,
)
from pipeline.client.async_client import AsyncClient
from pipeline.engine.harness import Pipeline

STARTUP_TIMEOUT_S: Final = 500.0

T = TypeVar("T")


@dataclass(frozen=True)
class Engine:
    """The engine to launch: a configuration file, and the command line's changes to it."""

    config: Path
    overrides: tuple[str, ...]
    vocab_size: int
    timeline: Path | None = None  # a file for the engine's trace

    def with_overrides(self, *overrides: str) -> Engine:
        return replace(self, overrides=(*self.overrides, *overrides))

    def measure(self, work: Work, stream: bool) -> tuple[float, Run]:
        """Return the seconds until the engine was ready, and a run of all requests at once."""
        prompts = make_prompts(work.num_requests, work.prompt_len, self.vocab_size)
        return self._drive(work, lambda client: run_all(client, prompts, work.output_len, stream, work.sampling))

    def measure_mixed(
        self, work: Work, num_background: int, rate_per_s: float, seconds: float
    ) -> tuple[float, MixedRun]:
        """Return the same for `num_background` streams, while further requests of `work`'s lengths arrive."""
        moments = poisson_arrivals(rate_per_s, seconds)
        prompts = make_prompts(num_background + len(moments), work.prompt_len, self.vocab_size)
        background, arriving = prompts[:num_background], prompts[num_background:]
        return self._drive(
            work,
            lambda client: run_mixed(client, background, arriving, moments, work.output_len, seconds, work.sampling),
        )

    def profile(self, work: Work) -> dict[str, Any]:
        """Return the report of the GPU process's profiler (`workers/gpu/profiling/step_profiler.py`) about some steps.

        Raises RuntimeError for work that has fewer steps than the profiler's window.
        """
        with tempfile.TemporaryDirectory(prefix="ringfeed-profile-") as folder:
            path = Path(folder) / "profile.json"
            self.with_overrides(f"model.profile_path={path}").measure(work, stream=False)
            if not path.exists():
                raise RuntimeError(f"{work} is too short to profile: it has fewer steps than the profiler's window")
            profile: dict[str, Any] = json.loads(path.read_bytes())
            return profile

    def _drive(self, work: Work, drive: Callable[[AsyncClient], Awaitable[T]]) -> tuple[float, T]:
        async def warm_up_and_drive(endpoint: str) -> T:
            async with AsyncClient(endpoint) as client:
                # Steps of the same sizes, because kernels are compiled and libraries loaded when they first run.
                others = make_prompts(work.num_requests, work.prompt_len, self.vocab_size, WARM_UP_SEED)
                output_len = min(WARM_UP_OUTPUT_LEN, work.output_len)
                await run_all(client, others, output_len, False, work.sampling)
                await client.clear_cache()
                return await drive(client)

        start = time.perf_counter()
        with Pipeline(
            self.config, self.overrides, startup_timeout_s=STARTUP_TIMEOUT_S, timeline=self.timeline
        ) as pipeline:
            ready_s = time.perf_counter() - start
            return ready_s, asyncio.run(warm_up_and_drive(pipeline.endpoint))
