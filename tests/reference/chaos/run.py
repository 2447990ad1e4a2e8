"""One run of chaos on one engine."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pipeline import AsyncClient, Pipeline
from tests.reference.chaos import report
from tests.reference.chaos.faults import Fault, Faults
from tests.reference.chaos.idle import Footprint, footprints, rest
from tests.reference.chaos.load import TIMEOUT_S, Load, Tally
from tests.reference.chaos.questions import questions

HANG_TIMEOUT_S: Final = 3.0
# Rows and blocks are scarce, so that requests queue and are preempted while processes die.
ENGINE: Final[dict[str, Any]] = {
    "tokenizer.num_workers": 2,
    "grammar.num_workers": 2,
    "scheduler.max_num_seqs": 24,
    "scheduler.max_num_batched_tokens": 256,
    "cache.block_size": 16,
    "cache.num_blocks": 180,
    "supervisor.hang_timeout_s": HANG_TIMEOUT_S,
    "supervisor.max_restarts": 10_000,
}
_PERIOD_S: Final = 300.0


@dataclass(frozen=True)
class Plan:
    """What is asked, and what is done to the engine."""

    num_kills: int = 100
    num_hangs: int = 10
    seconds: float = 500.0  # for the kills
    seed: int = 0
    kill_every_s: float | None = None  # at regular intervals instead
    num_streams: int = 64
    batch_size: int = 200
    num_http: int = 4
    roles: tuple[str, ...] = ()  # () = all


@dataclass
class Result:
    faults: list[Fault]
    tally: Tally
    before: dict[str, Footprint]
    after: dict[str, Footprint]
    held: list[str] = field(default_factory=list)  # what the engine still holds at rest

    @property
    def faulty(self) -> list[str]:
        """Everything that must not be."""
        bad = [f"{self.tally.num[name]} {name}" for name in report.BAD if self.tally.num[name]]
        bad += self.held + report.further_descriptors(self.before, self.after)
        return bad

    def __str__(self) -> str:
        parts = [report.table(self.faults), report.verdicts(self.tally), report.growth(self.before, self.after)]
        return "\n\n".join([*parts, "\n".join(["FAULTS:", *self.faulty]) if self.faulty else "no faults"])


def run(config: str | os.PathLike[str] | Mapping[str, Any], plan: Plan, overrides: Sequence[str], log: Path) -> Result:
    """Start an engine, disturb it, and end it."""
    with Pipeline(config, [*(f"{key}={value}" for key, value in ENGINE.items()), *overrides], log=log) as pipeline:
        return asyncio.run(disturb(pipeline, plan))


async def disturb(pipeline: Pipeline, plan: Plan) -> Result:
    """Disturb a running engine. Raises TimeoutError if a hanging process is not replaced."""
    max_num_seqs = pipeline.config.scheduler.max_num_seqs
    faults = Faults(lambda: pipeline.pids, plan.seed, plan.roles)
    async with AsyncClient(pipeline.endpoint, timeout_s=TIMEOUT_S, resume_timeout_s=TIMEOUT_S) as client:

        async def serves() -> bool:
            return (await client.health()).state == "ready"

        load = Load(client, questions(), faults.done, pipeline.http_url)
        await load.learn()
        await rest(client, max_num_seqs)
        before = footprints(pipeline.pids)
        running = asyncio.create_task(
            load.run(num_streams=plan.num_streams, batch_size=plan.batch_size, num_http=plan.num_http)
        )
        periods = asyncio.create_task(_print_periods(pipeline, load.tally))
        try:
            await asyncio.sleep(1.0)
            mean_s = plan.kill_every_s or plan.seconds / max(plan.num_kills, 1)
            await faults.kill(plan.num_kills, mean_s, is_regular=plan.kill_every_s is not None)
            await faults.hang(plan.num_hangs, HANG_TIMEOUT_S * 3, serves)
        finally:
            load.stop()
            periods.cancel()
            print("waiting for open requests", flush=True)
            await asyncio.wait_for(running, TIMEOUT_S)
        held = await rest(client, max_num_seqs)
        return Result(faults.done, load.tally, before, footprints(pipeline.pids), held)


async def _print_periods(pipeline: Pipeline, tally: Tally) -> None:
    start = begin = time.monotonic()
    while True:
        await asyncio.sleep(_PERIOD_S)
        end = time.monotonic()
        print(report.period(tally, begin, end, footprints(pipeline.pids), start), flush=True)
        begin = end
