"""Kills the GPU process under streams, and measures how long they pause, by the stages of its restart.

Each stream goes on by itself, because the engine starts the process again. "Pause" is the time from the death to a
stream's next token. The stages come from the statistics page of the new process, whose clock is this machine's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from rich.console import Console
from rich.table import Table

from ipc.errors import ConfigError, EngineUnavailable
from pipeline import AsyncClient, Pipeline, SamplingParams
from pipeline.bench.arguments import add_engine, positive
from pipeline.bench.engine import STARTUP_TIMEOUT_S
from pipeline.bench.steady_streams import steady_streams

_LOOK_S: Final = 0.02
_TEXTS: Final = {
    "startup_imports_ns": "imports",
    "startup_device_ns": "device start",
    "startup_memory_ns": "wait for the former process's memory",
    "startup_check_ns": "checks of the model",
    "startup_weights_ns": "weights",
    "startup_compile_ns": "compilation, and a step for its size",
    "startup_tables_ns": "KV cache and tables",
    "startup_graphs_ns": "graphs",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine(parser)
    parser.add_argument("--streams", type=int, default=32, help="that run when the process dies")
    parser.add_argument("--warm-up", type=positive, default=1.0, help="seconds from the first tokens to the death")
    parser.add_argument("--timeout", type=positive, default=120.0, help="longest pause, in seconds")
    parser.add_argument("--json", action="store_true", help="print a JSON line instead of a table")


def run(arguments: argparse.Namespace) -> None:
    if arguments.streams < 1:
        raise ConfigError(f"--streams ({arguments.streams}) must be at least 1")
    found = measure(arguments.config, arguments.overrides, arguments.streams, arguments.warm_up, arguments.timeout)
    if arguments.json:
        print(json.dumps(found.as_dict()))
        return
    table = Table("from death to the next token", "s", title=f"{arguments.streams} streams, {os.cpu_count()} cores")
    for name, seconds in found.stages_s.items():
        table.add_row(name, f"{seconds:.2f}")
    table.add_section()
    for name, share in (("shortest pause", 0), ("p50", 50), ("p99", 99), ("longest", 100)):
        table.add_row(name, f"{np.percentile(found.pauses_s, share):.2f}")
    Console().print(table)


@dataclass(frozen=True)
class Restart:
    """One death. `stages_s` add up to the shortest pause."""

    pauses_s: list[float]  # of each stream
    stages_s: dict[str, float]  # in their order

    @classmethod
    def of(cls, counters: Mapping[str, float], died_ns: int, arrivals_ns: Sequence[Sequence[int]]) -> Restart:
        """What the new process's counters and the arrivals of each stream's tokens say, all in CLOCK_MONOTONIC ns.

        Tokens that arrived before the process was ready are of the dead one.
        """
        begun_ns, ready_ns = counters["startup_begun_at_ns"], counters["startup_ready_at_ns"]
        first_ns = [next(arrived_ns for arrived_ns in each if arrived_ns > ready_ns) for each in arrivals_ns]
        stages = {"death to the start of a process": begun_ns - died_ns}
        stages |= {text: counters[name] for name, text in _TEXTS.items()}
        stages["ready to the first token"] = min(first_ns) - ready_ns
        pauses_s = [(arrived_ns - died_ns) * 1e-9 for arrived_ns in first_ns]
        return cls(pauses_s, {name: duration * 1e-9 for name, duration in stages.items()})

    def as_dict(self) -> dict[str, object]:
        p50, p99, longest = np.percentile(self.pauses_s, (50, 99, 100)).round(3).tolist()
        stages = {name: round(seconds, 3) for name, seconds in self.stages_s.items()}
        return {"pause_p50_s": p50, "pause_p99_s": p99, "pause_max_s": longest, "stages_s": stages}


def measure(
    config: Path, overrides: list[str], num_streams: int, warm_up_s: float = 1.0, timeout_s: float = 120.0
) -> Restart:
    """Kill the GPU process of a new engine. Raises EngineUnavailable if a stream does not go on within `timeout_s`."""
    with Pipeline(config, overrides, startup_timeout_s=STARTUP_TIMEOUT_S) as pipeline:
        kill = partial(os.kill, pipeline.pids["gpu"], signal.SIGKILL)
        return asyncio.run(_kill_under_streams(pipeline.endpoint, kill, num_streams, warm_up_s, timeout_s))


async def _kill_under_streams(
    endpoint: str, kill: Callable[[], None], num_streams: int, warm_up_s: float, timeout_s: float
) -> Restart:
    arrivals_ns: list[list[int]] = [[] for _ in range(num_streams)]
    params = SamplingParams(ignore_eos=True)  # up to the model's length
    try:
        async with (
            asyncio.timeout(timeout_s + warm_up_s) as limit,
            AsyncClient(endpoint) as client,
            steady_streams(
                client, num_streams, lambda _: params, warm_up_s, lambda i: arrivals_ns[i].append(time.monotonic_ns())
            ) as wait_until,
        ):
            died_ns = time.monotonic_ns()
            kill()
            limit.reschedule(asyncio.get_running_loop().time() + timeout_s)
            counters = await _counters_of_successor(client, died_ns)
            await wait_until(lambda: all(each[-1] > counters["startup_ready_at_ns"] for each in arrivals_ns))
    except TimeoutError:
        raise EngineUnavailable(f"not every stream had a token within {timeout_s:g} s (--timeout)") from None
    return Restart.of(counters, died_ns, arrivals_ns)


async def _counters_of_successor(client: AsyncClient, died_ns: int) -> Mapping[str, float]:
    """The counters of the process that is ready in place of the one that died."""
    while (counters := (await client.stats())["gpu"])["startup_ready_at_ns"] < died_ns:
        await asyncio.sleep(_LOOK_S)
    return counters
