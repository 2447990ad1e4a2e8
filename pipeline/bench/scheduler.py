"""Measures the scheduler alone: its time for a step, for an arriving request and for an ending one.

Runs the real `Scheduler` on real records. Results are made up at once, so nothing else runs in between. Every prompt
has 1,000 tokens, blocks hold 16, and one step is always in flight while another is planned (depth 2). "Plan" fills a
step record; "apply" reads a result record and builds the message to the detokenizer. The first phase is pure decode. In
the second phase some sequences end and equally many arrive in every other step:

    decode | quiet step | step with n ends and n arrivals | quiet step | step with n ends and n arrivals | ...

The extra time of these steps over the median quiet step, divided by n, is the price of one end and of one arrival. The
prefix cache is on. All prompts differ, and the hashes of their blocks come with them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from time import perf_counter_ns
from typing import Final

import numpy as np
from rich.console import Console
from rich.table import Table

from ipc.block_hash import HASH_BYTES, chain_hashes
from ipc.errors import ConfigError
from ipc.messages import Route, Tokenized
from ipc.record_layout import Layout, R
from ipc.records import PROMPT_RECORD_TOKENS, FinishCode, StepShape, prompt_layout, result_layout, step_layout
from ipc.ring import Ring, close_handle
from ipc.sampling_params import SamplingParams
from pipeline.bench.arguments import comma_separated
from workers.scheduler.admission.prompt_rings import PromptRings
from workers.scheduler.config import SchedulerConfig
from workers.scheduler.scheduler import Scheduler

NUM_PROMPT_TOKENS: Final = 1_000
BLOCK_SIZE: Final = 16
DEPTH: Final = 2
NUM_WARM_UP_STEPS: Final = 50
NUM_CHURN_STEPS: Final = 200
NUM_CHURNED: Final = 8  # sequences that end, and that arrive, in every other one of these steps
MAX_NUM_BATCHED_TOKENS: Final = 16_384


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-seqs",
        type=comma_separated(int),
        default=[32, 256, 512, 1024],
        help="sequences that run, comma-separated",
    )
    parser.add_argument("--steps", type=int, default=1_000, help="steps of pure decode")
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")


def run(arguments: argparse.Namespace) -> None:
    table = Table(title=f"scheduler benchmark, {os.cpu_count()} cores, us")
    for name in ("sequences", "plan p50", "p99", "apply p50", "p99", "both p50", "p99", "arrival", "end"):
        table.add_column(name, justify="right")
    for num_seqs in arguments.num_seqs:
        figures = measure(num_seqs, arguments.steps)
        if arguments.json:
            print(json.dumps({"num_seqs": num_seqs, "steps": arguments.steps, **figures}), flush=True)
        else:
            table.add_row(f"{num_seqs}", *(f"{value:.1f}" for value in figures.values()))
    if not arguments.json:
        Console(width=max(Console().width, 110)).print(table)


def measure(num_seqs: int, num_steps: int) -> dict[str, float]:
    """Return times in us by name. Needs at least one step and two sequences, because one must continue while another
    ends."""
    if num_seqs < 2 or num_steps < 1:
        raise ConfigError(f"--num-seqs ({num_seqs}) must be at least 2 and --steps ({num_steps}) at least 1")
    engine = _Engine(num_seqs, num_steps)
    engine.fill()
    for _ in range(NUM_WARM_UP_STEPS):
        engine.step()
    gc.collect()
    times = np.array([engine.step() for _ in range(num_steps)]) / 1e3  # [num_steps, 2]
    figures = {}
    for name, column in (("plan", times[:, 0]), ("apply", times[:, 1]), ("plan_apply", times.sum(axis=1))):
        figures[f"{name}_p50_us"], figures[f"{name}_p99_us"] = np.percentile(column, (50, 99)).tolist()
    figures["arrival_us"], figures["end_us"] = engine.churn(min(NUM_CHURNED, num_seqs // 2))
    return {name: round(value, 1) for name, value in figures.items()}


class _Engine:
    """A scheduler, its tokenizer's ring, and records that a GPU process would fill."""

    def __init__(self, num_seqs: int, num_steps: int) -> None:
        most_steps = num_steps + NUM_WARM_UP_STEPS + NUM_CHURN_STEPS + num_seqs  # of decode; `fill` takes some too
        max_model_len = NUM_PROMPT_TOKENS + most_steps + 100
        num_batched = max(MAX_NUM_BATCHED_TOKENS, num_seqs)
        shape = StepShape(num_seqs, num_batched, max_model_len, BLOCK_SIZE)
        sizes = (-(-max_model_len // PROMPT_RECORD_TOKENS), 2 * num_seqs + 4 * NUM_CHURNED)
        rings = [Ring.create(f"prompt.{i}", prompt_layout(), size, 1) for i, size in enumerate(sizes)]
        for ring in rings:
            close_handle(ring.handle)
        self.num_seqs = num_seqs
        self.scheduler = Scheduler(
            SchedulerConfig(max_num_seqs=num_seqs, max_num_batched_tokens=num_batched),
            shape,
            DEPTH,
            (num_seqs + 1) * (shape.max_blocks_per_seq + 1),
            [],
            PromptRings(rings),
        )
        self._tokenizer = rings[1]
        self._rng = np.random.default_rng(0)
        self._params = SamplingParams(ignore_eos=True, seed=1)
        self._num_added = 0
        self._records = [_record(step_layout(shape)) for _ in range(2 * DEPTH)]
        self._result = _record(result_layout(shape))
        self._num_planned = 0

    def fill(self) -> None:
        """Add all sequences and compute their prompts."""
        for _ in range(self.num_seqs):
            self.add()
        self._plan()
        while self.scheduler.gauges()["num_running"] < self.num_seqs or self._is_prefilling():
            self.step()

    def add(self) -> int:
        """Add one more request. Returns the scheduler's time for it, in ns."""
        token_ids = self._rng.integers(0, 50_000, NUM_PROMPT_TOKENS, np.int32)
        self._tokenizer.claim().token_ids[:NUM_PROMPT_TOKENS] = token_ids
        self._tokenizer.publish()
        self._num_added += 1
        message = Tokenized(
            key=self._num_added,
            route=Route(client=b"bench", request_id=f"{self._num_added}", stream=True),
            params=self._params,
            ring=1,
            ticket=self._tokenizer.next_ticket - 1,
            num_prompt_tokens=NUM_PROMPT_TOKENS,
            arrived_ns=0,
            block_hashes=chain_hashes(bytes(HASH_BYTES), token_ids.tobytes(), BLOCK_SIZE),
        )
        started = perf_counter_ns()
        self.scheduler.add(message)
        return perf_counter_ns() - started

    def step(self, num_ends: int = 0) -> tuple[int, int]:
        """Plan a step, then apply the step before it, which ends its first `num_ends` sequences. Returns the ns of
        both."""
        plan_ns = self._plan()
        self._result.finish[:] = FinishCode.RUNNING
        self._result.finish[:num_ends] = FinishCode.STOP
        started = perf_counter_ns()
        self.scheduler.apply(self._result)
        self.scheduler.take_outputs()
        return plan_ns, perf_counter_ns() - started

    def churn(self, num: int) -> tuple[float, float]:
        """Return the price in us of one arrival and of one end, while `num` end and `num` arrive in every other
        step."""
        quiet, add_ns, admit_ns, end_ns = [], [], [], []
        for _ in range(NUM_CHURN_STEPS // 4):
            end_ns.append(self.step(num)[1])
            self.step()  # their rows are free from here on
            add_ns.append(sum(self.add() for _ in range(num)))
            admit_ns.append(self.step()[0])
            quiet.append(self.step())
        plan_ns, apply_ns = np.median(np.array(quiet), axis=0).tolist()
        arrival = np.median(add_ns) + np.median(admit_ns) - plan_ns
        return float(arrival) / num / 1e3, float(np.median(end_ns) - apply_ns) / num / 1e3

    def _plan(self) -> int:
        record = self._records[self._num_planned % len(self._records)]
        self._num_planned += 1
        started = perf_counter_ns()
        planned = self.scheduler.plan(record)
        elapsed = perf_counter_ns() - started
        assert planned, "there was nothing to plan"
        return elapsed

    def _is_prefilling(self) -> bool:
        record = self._records[(self._num_planned - 1) % len(self._records)]
        return int(record.num_tokens[0]) != self.num_seqs


def _record(layout: Layout[R]) -> R:
    return layout.views(memoryview(bytearray(layout.num_bytes)))
