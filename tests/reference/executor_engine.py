"""Runs requests through an executor on any device, in this process, with the scripted scheduler of the simulation."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any

import torch

from ipc.records import StepShape, prompt_layout, result_layout, step_layout
from ipc.ring import Ring, close_handle
from tests.simulation.scripted import ScriptedRequest, ScriptedScheduler
from workers.gpu.device.base import Device
from workers.gpu.execution.buckets import Buckets
from workers.gpu.execution.executor import Executor
from workers.gpu.execution.model_runner import ModelRunner
from workers.gpu.execution.rings import GpuRings


class Steady(Random):
    """Random choices that are not random: whole prompts, every sequence in every step, no preemption."""

    def random(self) -> float:
        return 0.0

    def shuffle(self, x: Any) -> None:
        pass

    def randrange(self, *_: Any, **__: Any) -> int:
        return 0


class ExecutorEngine:
    """`run` computes requests to their end. It has one prompt ring, the scheduler's, and no separate thread."""

    def __init__(
        self,
        device: Device[Any, Any],
        runner: ModelRunner,
        shape: StepShape,
        depth: int,
        num_blocks: int,
        rings: Sequence[tuple[Ring[Any], Ring[Any]]],
        buckets: Buckets | None,
    ) -> None:
        self.device = device
        self.depth = depth
        self._shape = shape
        self._num_blocks = num_blocks
        (self._steps, steps), (results, self._results), (self._uploads, uploads) = rings
        gpu_rings = GpuRings(steps, results, [uploads])
        self.executor = Executor(device, runner, shape, depth, num_blocks, gpu_rings, buckets=buckets)
        self.buckets_run: set[tuple[int, int]] = set()
        self.steps_run: list[tuple[int, int]] = []  # sequences and tokens of each

    def run(self, requests: Sequence[ScriptedRequest], seed: int | Random = 0) -> list[list[int]]:
        """The tokens of each request, by steps drawn from the seed."""
        random = seed if isinstance(seed, Random) else Random(seed)
        scheduler = ScriptedScheduler(random, self._shape, self._num_blocks, [self._uploads])
        scheduler.waiting.extend(requests)
        in_flight = 0
        while not scheduler.is_idle:
            if in_flight < self.depth and self._plan(scheduler):
                in_flight += 1
                continue
            if in_flight:
                self.device.synchronize(self.executor.under_way[0].outputs_done)
                self.executor.publish()
                result = self._results.take()
                assert result is not None, "the result was published"
                assert 0 < result.device_start_ns[0] <= result.device_end_ns[0] <= time.monotonic_ns() + 1_000_000
                scheduler.apply(result)
                self._results.release_through(self._results.next_ticket - 1)
                in_flight -= 1
        return [request.tokens for request in requests]

    def _plan(self, scheduler: ScriptedScheduler) -> bool:
        record = self._steps.claim()
        if not scheduler.plan(record):
            return False
        self._steps.publish()
        self.steps_run.append((int(record.num_seqs[0]), int(record.num_tokens[0])))
        self.buckets_run.add(self.executor.bucket(*self.steps_run[-1]))
        assert self.executor.submit_next(time.monotonic_ns()) is not None, "the step was published"
        return True


@contextmanager
def executor_engine(
    device: Device[Any, Any],
    runner: ModelRunner,
    shape: StepShape,
    depth: int,
    num_blocks: int,
    buckets: Buckets | None = None,
) -> Iterator[ExecutorEngine]:
    """An engine with its own rings. They stay mapped: a device may have page-locked them."""
    handles = []
    ends = []
    for name, layout, size in (
        ("step", step_layout(shape), 2 * depth),
        ("result", result_layout(shape), 2 * depth),
        ("prompt.0", prompt_layout(), 8),
    ):
        writer = Ring.create(name, layout, size, 1)
        handles.append(writer.handle)
        ends.append((writer, Ring.attach(writer.handle, layout)))
    try:
        with torch.inference_mode():
            yield ExecutorEngine(device, runner, shape, depth, num_blocks, ends, buckets)
            device.settle()
    finally:
        for handle in handles:
            close_handle(handle)
