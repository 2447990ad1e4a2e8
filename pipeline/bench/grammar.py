"""Measures what structured outputs cost: whether the device waits for masks, and how long masks take.

Every sequence streams to one client in this process. All, half or none of them have a JSON schema. The device's time
per step is simulated (`model.null_step_ms`), and tokens are made up; with `--step-ms model`, the configured model runs
instead, and tokens are sampled with temperature 1. "Device waited for masks" is the share of the device's time with
work in which a step's model was done and its masks were not there. "Mask path" is the time from the publication of a
result until the next step's masks, made from that result's tokens, are on their way to the device. It passes through
the scheduler and a grammar process. "Inter-token" is the time of a step.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline import AsyncClient, Pipeline, SamplingParams, StructuredOutputs
from pipeline.bench.arguments import add_engine, comma_separated, positive
from pipeline.bench.engine import STARTUP_TIMEOUT_S
from pipeline.bench.steady_streams import steady_streams
from pipeline.engine.config import load_config
from pipeline.engine.model_files import find_model
from pipeline.metrics.figures import Figures, Window
from pipeline.timeline.reader import load_timeline

WARM_UP_S: Final = 1.5  # from the moment when every sequence has begun
REAL_MODEL: Final = -1.0  # in place of a step's time
SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": ["string", "null"]},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["street", "zip"],
            "additionalProperties": False,
        },
        "friends": {"type": "array", "items": {"$ref": "#"}},
    },
    "required": ["name", "age", "tags", "address", "friends"],
    "additionalProperties": False,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine(parser)
    parser.add_argument("--num-seqs", type=comma_separated(int), default=[32, 256], help="comma-separated")
    parser.add_argument(
        "--step-ms", type=_step_times, default=[1.0, 4.0, 10.0], help="device time of a step, comma-separated, or model"
    )
    parser.add_argument(
        "--share", type=comma_separated(float), default=[0.0, 0.5, 1.0], help="of sequences that have a schema"
    )
    parser.add_argument("--seconds", type=positive, default=5.0, help="length of each measurement")
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")


def _step_times(text: str) -> list[float]:
    return [REAL_MODEL] if text == "model" else comma_separated(float)(text)


def run(arguments: argparse.Namespace) -> None:
    table = Table(title=f"grammar benchmark, {os.cpu_count()} cores, all sequences streaming")
    for name in (
        "sequences", "with schema", "device ms", "steps/s", "device waited", "for masks", "mask path p50 ms", "p99",
        "inter-token p50 ms", "p99", "late masks",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for num_seqs, step_ms, share in itertools.product(arguments.num_seqs, arguments.step_ms, arguments.share):
        found = measure(arguments.config, arguments.overrides, num_seqs, step_ms, share, arguments.seconds)
        row = {"num_seqs": num_seqs, "schema_share": share, "step_ms": step_ms, **found.as_dict()}
        if arguments.json:
            print(json.dumps(row), flush=True)
            continue
        table.add_row(
            f"{num_seqs}", f"{share:.0%}", "model" if step_ms == REAL_MODEL else f"{step_ms:g}",
            f"{row['steps_per_s']:,.0f}", f"{row['device_wait_share']:.2%}", f"{row['mask_wait_share']:.2%}",
            f"{row['mask_path_p50_ms']}", f"{row['mask_path_p99_ms']}", f"{row['inter_token_p50_ms']}",
            f"{row['inter_token_p99_ms']}", f"{row['num_late_masks']}",
        )  # fmt: skip
    if not arguments.json:
        Console(width=max(Console().width, 150)).print(table)


@dataclass(frozen=True)
class Measurement:
    """Of one window of pure decode, except for the prompts of answers that begin anew."""

    figures: Figures
    num_late_masks: int
    mask_paths_s: list[float]
    step_intervals_s: list[float]

    def as_dict(self) -> dict[str, float]:
        device = self.figures.device
        return {
            "steps_per_s": round(self.figures.steps_per_s, 1),
            "tokens_per_s": round(self.figures.tokens_per_s),
            "device_wait_share": round(device.wait_share, 5),
            "mask_wait_share": round(device.masks_ns / max(device.busy_ns + device.waited_ns, 1.0), 5),
            "num_masked_steps": len(self.mask_paths_s),
            "num_late_masks": self.num_late_masks,
            **_percentiles("mask_path", self.mask_paths_s),
            **_percentiles("inter_token", self.step_intervals_s),
        }


def _percentiles(name: str, seconds: list[float]) -> dict[str, float]:
    values = np.percentile(seconds, (50, 99)).tolist() if seconds else (0.0, 0.0)
    return {f"{name}_p{p}_ms": round(value * 1e3, 3) for p, value in zip((50, 99), values, strict=True)}


def measure(
    config: Path, overrides: list[str], num_seqs: int, step_ms: float, share: float, seconds: float
) -> Measurement:
    """Launch an engine, and measure about `seconds` of it."""
    settings = [
        f"scheduler.max_num_seqs={num_seqs}",
        f"scheduler.max_num_batched_tokens={max(512, num_seqs)}",
        *overrides,
    ]
    if step_ms != REAL_MODEL:
        vocab_size = find_model(load_config(config, settings)).vocab_size
        settings += [
            "model.load_format=null",
            f"model.null_step_ms={step_ms}",
            f"model.null_vocab_size={vocab_size}",
        ]
    with tempfile.TemporaryDirectory(prefix="ringfeed-bench-") as folder:
        timeline = Path(folder) / "timeline.json"
        with Pipeline(config, settings, startup_timeout_s=STARTUP_TIMEOUT_S, timeline=timeline) as pipeline:
            figures, num_late = asyncio.run(
                _stream_all(pipeline.endpoint, num_seqs, share, seconds, float(step_ms == REAL_MODEL))
            )
        mask_paths, intervals = _read_times(timeline, seconds)
    return Measurement(figures, num_late, mask_paths, intervals)


async def _stream_all(
    endpoint: str, num_seqs: int, share: float, seconds: float, temperature: float
) -> tuple[Figures, int]:
    seeds = itertools.count(1)
    structured = StructuredOutputs(json=SCHEMA)

    def params_of(index: int) -> SamplingParams:
        has_schema = index < round(share * num_seqs)
        return SamplingParams(
            temperature=temperature, seed=next(seeds), ignore_eos=not has_schema,
            structured_outputs=structured if has_schema else None,
        )  # fmt: skip

    async with AsyncClient(endpoint) as client, steady_streams(client, num_seqs, params_of, WARM_UP_S):
        before = await client.stats()
        window = Window(before)
        await asyncio.sleep(seconds)
        after = await client.stats()
        return window.close(after), int(after["gpu"]["num_late_masks"] - before["gpu"]["num_late_masks"])


def _read_times(timeline: Path, seconds: float) -> tuple[list[float], list[float]]:
    """The mask path of each step that owed masks, and the time between the ends of successive steps, in seconds.

    A step that owes masks is launched twice: its model, and the rest when its masks are there.
    """
    found = load_timeline(timeline)
    launches: dict[int, list[float]] = defaultdict(list)
    published: dict[int, float] = {}
    for bar in found.bars["gpu"]:
        if bar.name == "launch":
            launches[bar.args["ticket"]].append(bar.start_s)
        elif bar.name == "publish":
            published[bar.args["ticket"]] = bar.end_s
    ends = [step.end_s for step in found.steps]
    since_s = max(ends, default=0.0) - seconds
    paths = [
        starts[1] - max(published[ticket - 1], starts[0])
        for ticket, starts in launches.items()
        if len(starts) == 2 and ticket - 1 in published and starts[1] > since_s
    ]
    intervals = [later - earlier for earlier, later in itertools.pairwise(ends) if earlier > since_s]
    return paths, intervals
