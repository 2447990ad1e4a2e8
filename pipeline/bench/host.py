"""Runs the whole pipeline with a model that costs nothing, and measures the host's time and whether the device waits
for it.

Every sequence streams to one client in this process, so that gateway, detokenizer and client carry their full load. The
device's time per step is simulated (`model.null_step_ms`). Its compute queue is a timeline: a step starts when it has
been submitted and the step before it has ended. "Device waited" is the share of that timeline during which work existed
but had not reached the device.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline import AsyncClient, Pipeline, SamplingParams
from pipeline.bench.arguments import comma_separated, made_folder, positive
from pipeline.bench.steady_streams import steady_streams
from pipeline.engine.small_model import CONFIG
from pipeline.metrics.figures import Figures, Window

WARM_UP_S = 1.0  # from the moment when every sequence has begun


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=CONFIG, help="only its tokenizer is used")
    parser.add_argument("--num-seqs", type=comma_separated(int), default=[1, 32, 256], help="comma-separated")
    parser.add_argument("--step-ms", type=comma_separated(float), default=[0, 1, 4, 10], help="device time of a step")
    parser.add_argument("--depth", type=comma_separated(int), default=[2], help="ring.depth, comma-separated")
    parser.add_argument("--seconds", type=positive, default=5.0, help="length of each measurement")
    parser.add_argument(
        "--timeline", type=made_folder, metavar="FOLDER", help="write a timeline of each measurement there"
    )
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")


def run(arguments: argparse.Namespace) -> None:
    table = Table(title=f"host benchmark, {os.cpu_count()} cores, all sequences streaming")
    for name in ("sequences", "depth", "device ms", "steps/s", "tokens/s", "device waited", "plan us", "apply us"):
        table.add_column(name, justify="right")
    table.add_column("CPU us per step by process")
    for depth in arguments.depth:
        for num_seqs in arguments.num_seqs:
            for step_ms in arguments.step_ms:
                timeline = None
                if arguments.timeline is not None:
                    timeline = arguments.timeline / f"depth{depth}-{num_seqs}x{step_ms:g}ms.json.gz"
                figures, client_us = measure(arguments.config, num_seqs, step_ms, depth, arguments.seconds, timeline)
                row = {"num_seqs": num_seqs, "depth": depth, "step_ms": step_ms, **_as_dict(figures, client_us)}
                if arguments.json:
                    print(json.dumps(row), flush=True)
                else:
                    _add_row(table, row)
    if not arguments.json:
        Console(width=max(Console().width, 150)).print(table)


def measure(
    config: Path, num_seqs: int, step_ms: float, depth: int, seconds: float, timeline: Path | None = None
) -> tuple[Figures, float]:
    """Return figures of a steady pure-decode window of about `seconds`, and this client's CPU time per step in us."""
    overrides = {
        "model.load_format": "null",
        "model.null_step_ms": step_ms,
        "ring.depth": depth,
        "scheduler.max_num_seqs": num_seqs,
        "scheduler.max_num_batched_tokens": max(512, num_seqs),
    }
    with Pipeline(config, overrides, timeline=timeline) as pipeline:
        return asyncio.run(_stream_all(pipeline.endpoint, num_seqs, seconds))


async def _stream_all(endpoint: str, num_seqs: int, seconds: float) -> tuple[Figures, float]:
    params = SamplingParams(ignore_eos=True)
    async with AsyncClient(endpoint) as client, steady_streams(client, num_seqs, lambda _: params, WARM_UP_S):
        window, cpu = Window(await client.stats()), time.process_time()
        await asyncio.sleep(seconds)
        figures = window.close(await client.stats())
        return figures, (time.process_time() - cpu) * 1e6 / max(figures.num_steps, 1)


def _as_dict(figures: Figures, client_us: float) -> dict[str, object]:
    return {
        "steps_per_s": round(figures.steps_per_s, 1),
        "tokens_per_s": round(figures.tokens_per_s),
        "device_wait_share": round(figures.device_wait_share, 4),
        "plan_us": round(figures.plan_us_per_step, 1),
        "apply_us": round(figures.apply_us_per_step, 1),
        "cpu_us": {**{k: round(v) for k, v in figures.host_us_per_step.items()}, "client": round(client_us)},
    }


def _add_row(table: Table, row: dict[str, object]) -> None:
    cpu = row["cpu_us"]
    assert isinstance(cpu, dict)
    table.add_row(
        f"{row['num_seqs']}", f"{row['depth']}", f"{row['step_ms']:g}", f"{row['steps_per_s']:,.0f}",
        f"{row['tokens_per_s']:,}", f"{row['device_wait_share']:.1%}", f"{row['plan_us']}", f"{row['apply_us']}",
        "  ".join(f"{role} {us}" for role, us in cpu.items()),
    )  # fmt: skip
