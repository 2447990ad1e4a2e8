"""A device that never finishes a step is seen: `stalled_s` grows, and the process still answers."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from ipc.records import StepShape, step_layout
from tests.reference.gpu_process import FakeProcess, gpu_process
from tests.simulation.harness import ToyModel
from tests.unit.workers.gpu.execution.test_executor import DEADLINE_S, Ends, publish_step
from tests.unit.workers.gpu.execution.test_step_masks import MS, TIMEOUT_NS, Engine
from workers.gpu import worker
from workers.gpu.config import ModelConfig
from workers.gpu.device.cpu import CpuDevice
from workers.gpu.execution.announced_runner import MARGIN, MAX_STEP_S, AnnouncedRunner
from workers.gpu.execution.batch_builder import BatchBuilder
from workers.gpu.execution.executor import Executor
from workers.gpu.execution.row_tables import RowTables
from workers.gpu.execution.tensor_views import StepTensors, tensor_views
from workers.process import StopWorker

SHAPE = StepShape(max_num_seqs=3, max_num_batched_tokens=16, max_model_len=32, block_size=4)


def test_a_step_stalls_from_its_submission_or_from_the_result_before_it() -> None:
    ends, now_ns = Ends(SHAPE, 2), 5 * MS
    executor = Executor(CpuDevice(), ToyModel(SHAPE, 16), SHAPE, 2, 16, ends.gpu, monotonic_ns=lambda: now_ns)
    assert executor.stalled_s(now_ns) == 0
    with torch.inference_mode():
        for _ in range(2):
            publish_step(ends.steps)
            executor.submit_next(now_ns)
    now_ns = 2_005 * MS
    assert executor.stalled_s(now_ns) == 2
    executor.publish()
    assert executor.stalled_s(now_ns + 500 * MS) == 0.5
    executor.publish()
    assert executor.stalled_s(now_ns + 500 * MS) == 0, "nothing is owed"


def test_a_step_held_back_stalls_once_its_masks_are_overdue() -> None:
    engine = Engine()
    engine.plan(1)
    assert engine.submit() is None
    assert engine.executor.stalled_s(engine.now_ns + TIMEOUT_NS) == 0, "it waits no longer than it may"
    assert engine.executor.stalled_s(engine.now_ns + TIMEOUT_NS + 3_000 * MS) == 3


class Pinged(FakeProcess):
    """Is asked at each `wait` for how long its work has stalled, as a launcher's ping does, until the result comes."""

    def __init__(self, gpu: Any) -> None:
        super().__init__(gpu.bootstrap.worker)
        self.stalls: list[float] = []
        self._results = gpu.results
        self._deadline = time.monotonic() + DEADLINE_S

    def wait(self, timeout_ms: int | None = None) -> None:
        assert time.monotonic() < self._deadline, "the result does not come"
        is_over = self._results.is_published(1)
        self.stalls.append(self.stalled_s())
        if is_over and not self.stalls[-1]:
            raise StopWorker


def test_a_process_answers_while_its_device_does_not_finish_a_step_and_says_for_how_long() -> None:
    with gpu_process(ModelConfig(path="unused", load_format="null", null_step_ms=150), SHAPE) as gpu:
        process: Any = Pinged(gpu)
        publish_step(gpu.steps)
        with pytest.raises(StopWorker):
            worker.run(process, gpu.bootstrap)
    longest = max(process.stalls)
    growing = process.stalls[: process.stalls.index(longest) + 1]
    assert longest > 0.1
    assert growing == sorted(growing)


class Slow(ToyModel):
    """Each token takes a time that the test sets."""

    def __init__(self) -> None:
        super().__init__(SHAPE, 16)
        self.now_s = 0.0
        self.token_s = 0.0

    def logits(self, batch: Any, *, out: torch.Tensor | None = None) -> torch.Tensor:
        self.now_s += batch.num_tokens * self.token_s
        return torch.zeros(batch.num_seqs, self.vocab_size)


def test_a_step_that_may_keep_the_cpu_longer_than_a_hang_is_announced_and_its_end_too() -> None:
    model, said = Slow(), []
    runner = AnnouncedRunner(model, said.append, clock_s=lambda: model.now_s)

    def step(num_tokens: int) -> list[float]:
        said.clear()
        runner.logits(BatchBuilder(CpuDevice(), tables, record).batch(1, num_tokens))
        return list(said)

    tables = RowTables(CpuDevice(), SHAPE, 16, model.vocab_size)
    layout = step_layout(SHAPE)
    record = tensor_views(StepTensors, layout, torch.zeros(layout.num_bytes, dtype=torch.uint8))
    model.token_s = 0.01
    assert step(4) == [MAX_STEP_S, 0], "nothing is known before the first step"
    assert step(4) == step(8) == [], "a short step is announced"
    model.token_s = 1.0
    step(4)
    assert step(4) == [4.0 * MARGIN, 0]
    assert step(16) == [16.0 * MARGIN, 0], "four times the tokens take four times as long at most"
    assert step(1) == [16.0 * MARGIN, 0], "fewer tokens may take as long"
    assert step(1) == [1.0 * MARGIN, 0], "such steps are known now"
