"""Sends many times more requests than the engine can serve. Measures memory, refusals, the latency of accepted
requests, and recovery.

The model costs nothing and the device's time per step is simulated, so that the device is the bottleneck, as it should
be in any engine. First the sustainable rate is measured: requests completed per second while there are always enough.
Then one client in this process sends requests at fixed times, regardless of the answers (an open loop). There are three
phases:

    half of the sustainable rate | a multiple of it: the overload | half of it again: the recovery
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from ipc.errors import QueueFull
from pipeline import AsyncClient, Pipeline, SamplingParams
from pipeline.bench.arguments import positive
from pipeline.engine.small_model import CONFIG

NUM_SEQS: Final = 32
STEP_MS: Final = 20.0
MAX_NUM_WAITING: Final = 64  # a queue that a caller would still wait for: two batches
PARAMS: Final = SamplingParams(max_tokens=32, ignore_eos=True)
PROMPT: Final = list(range(5, 69))
CALM: Final = 0.5  # of the sustainable rate
NUM_SLICES: Final = 6  # slices of the overload, for figures that must not drift
NUM_READINGS: Final = 8  # of memory
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


class Phase(msgspec.Struct):
    """The outcome of the requests of one phase. Times in seconds."""

    name: str
    rate: float  # requests sent per second
    seconds: float
    taken: list[tuple[float, float]] = []  # (time of sending, from the phase's beginning; time until the answer)
    refused: list[float] = []  # until the refusal

    def figures(self) -> dict[str, Any]:
        return {
            "phase": self.name,
            "rate": round(self.rate, 1),
            "num_sent": len(self.taken) + len(self.refused),
            "num_refused": len(self.refused),
            "finished_per_s": round(len(self.taken) / max((at + took for at, took in self.taken), default=1.0), 1),
            "latency_ms": _percentiles([took for _, took in self.taken]),
            "refusal_ms": _percentiles(self.refused),
        }

    def latency_by_slice(self) -> list[list[float]]:
        """Return the latency of accepted requests in ms, p50 and p99, over equal slices of the phase."""
        width = self.seconds / NUM_SLICES
        return [
            _percentiles([took for at, took in self.taken if i * width <= at < (i + 1) * width])
            for i in range(NUM_SLICES)
        ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=CONFIG, help="only its tokenizer is used")
    parser.add_argument("--seconds", type=positive, default=60.0, help="length of the overload")
    parser.add_argument("--calm-seconds", type=positive, default=10.0, help="length of each of the other phases")
    parser.add_argument("--times", type=positive, default=10.0, help="sent, as a multiple of the sustainable rate")
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of tables")


def run(arguments: argparse.Namespace) -> None:
    phases, rest, memory = measure(arguments.config, arguments.seconds, arguments.calm_seconds, arguments.times)
    rows = [phase.figures() for phase in phases]
    slices = phases[1].latency_by_slice()
    if arguments.json:
        for row in rows:
            print(json.dumps(row))
        print(json.dumps({"overload_latency_ms_by_slice": slices}))
        print(json.dumps({"rest": rest}))
        print(json.dumps({"rss_mib": memory}))
        return
    console = Console(width=max(Console().width, 120))
    table = Table(title=f"overload, {os.cpu_count()} cores")
    for name in ("phase", "sent/s", "sent", "refused", "finished/s", "latency p50 / p99 ms", "refusal p50 / p99 ms"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    console.print(table)
    console.print("latency in the overload, by slice, p50 / p99 ms:", "; ".join(map(_text, slices)))
    console.print("at rest:", ", ".join(f"{name} {value:g}" for name, value in rest.items()))
    table = Table("process", *memory["at_s"], title="resident memory, MiB, by second")
    for role, values in memory.items():
        if role != "at_s":
            table.add_row(role, *map(str, values))
    console.print(table)


def measure(
    config: Path, seconds: float, calm_seconds: float, times: float
) -> tuple[list[Phase], dict[str, float], dict[str, list[Any]]]:
    """Return the three phases, the counters of held resources afterwards by name, and each process's memory over
    time."""
    overrides = {
        "model.load_format": "null",
        "model.null_step_ms": STEP_MS,
        "scheduler.max_num_seqs": NUM_SEQS,
        "scheduler.max_num_waiting": MAX_NUM_WAITING,
    }
    with Pipeline(config, overrides) as pipeline:
        return asyncio.run(_drive(pipeline.endpoint, pipeline.pids, seconds, calm_seconds, times))


async def _drive(
    endpoint: str, pids: Mapping[str, int], seconds: float, calm_seconds: float, times: float
) -> tuple[list[Phase], dict[str, float], dict[str, list[Any]]]:
    async with AsyncClient(endpoint) as client:
        await _finished_per_s(client, calm_seconds / 4)  # warms up
        sustainable = await _finished_per_s(client, calm_seconds)
        memory = asyncio.create_task(_watch_memory(pids, (seconds + 2 * calm_seconds) / NUM_READINGS))
        phases = [
            Phase("calm", CALM * sustainable, calm_seconds),
            Phase(f"{times:g} times", times * sustainable, seconds),
            Phase("calm again", CALM * sustainable, calm_seconds),
        ]
        for phase in phases:
            await _send_at_rate(client, phase)
        memory.cancel()
        stats = await client.stats()
        scheduler, gateway = stats["scheduler"], stats["gateway"]
        rest = {
            "sustainable_per_s": round(sustainable, 1),
            "num_open": gateway["num_open"] + stats["detokenizer"]["num_open"],
            "num_waiting": gateway["num_waiting"] + scheduler["num_waiting"],
            "num_running": scheduler["num_running"],
            "num_blocks_held": scheduler["num_blocks"] - scheduler["num_free_blocks"],
            "num_refused": gateway["num_refused"] + scheduler["num_refused"],
        }
        return phases, rest, await memory


async def _finished_per_s(client: AsyncClient, seconds: float) -> float:
    """Return the requests completed per second while the batch and a part of the queue are full."""
    num_finished, deadline = 0, time.perf_counter() + seconds

    async def ask() -> None:
        nonlocal num_finished
        while time.perf_counter() < deadline:
            await client.generate(PROMPT, PARAMS)
            num_finished += 1

    started = time.perf_counter()
    await asyncio.gather(*(ask() for _ in range(NUM_SEQS + MAX_NUM_WAITING // 2)))
    return num_finished / (time.perf_counter() - started)


async def _send_at_rate(client: AsyncClient, phase: Phase) -> None:
    """Send each request when it is due, and return when all are answered."""
    started = time.perf_counter()

    async def ask(sent: float) -> None:
        try:
            await client.generate(PROMPT, PARAMS)
        except QueueFull:
            phase.refused.append(time.perf_counter() - sent)
        else:
            phase.taken.append((sent - started, time.perf_counter() - sent))

    async with asyncio.TaskGroup() as tasks:
        for number in range(int(phase.rate * phase.seconds)):
            await asyncio.sleep(max(0.0, started + number / phase.rate - time.perf_counter()))
            tasks.create_task(ask(time.perf_counter()))


async def _watch_memory(pids: Mapping[str, int], interval_s: float) -> dict[str, list[Any]]:
    """Record each process's resident memory in MiB every `interval_s` seconds, until cancelled."""
    memory: dict[str, list[Any]] = {"at_s": [], **{role: [] for role in pids}}
    started = time.perf_counter()
    try:
        while True:
            memory["at_s"].append(f"{time.perf_counter() - started:.0f}")
            for role, pid in pids.items():
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                memory[role].append(round(pages * _PAGE_BYTES / 2**20, 1))
            await asyncio.sleep(interval_s)
    except asyncio.CancelledError:
        return memory


def _percentiles(times_s: list[float]) -> list[float]:
    """Return p50 and p99 in ms; [] for an empty list."""
    return [round(value * 1e3, 1) for value in np.percentile(times_s, (50, 99)).tolist()] if times_s else []


def _text(value: Any) -> str:
    return " / ".join(f"{part:,g}" for part in value) if isinstance(value, list) else str(value)
