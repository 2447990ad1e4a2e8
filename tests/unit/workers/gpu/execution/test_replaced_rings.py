"""A GPU process outlives its scheduler: it drops the steps of the dead one, and takes those of a new one from new
rings."""

from __future__ import annotations

import time
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from ipc.mask_records import MaskRecord
from ipc.records import StepShape
from ipc.ring import Ring
from tests.reference.gpu_process import FakeProcess, gpu_process
from tests.simulation.harness import ToyModel
from tests.simulation.scripted import ScriptedRequest, ScriptedScheduler
from tests.simulation.simulated_device import SimulatedDevice
from tests.unit.workers.gpu.execution.test_executor import DEADLINE_S, Ends, LateWaiter, publish_step
from tests.unit.workers.gpu.execution.test_step_masks import Engine, tokens
from workers.gpu import worker
from workers.gpu.config import ModelConfig
from workers.gpu.device.cpu import CpuDevice
from workers.gpu.execution.executor import Executor
from workers.gpu.execution.result_publisher import ResultPublisher
from workers.process import StopWorker

SHAPE = StepShape(max_num_seqs=3, max_num_batched_tokens=16, max_model_len=32, block_size=4)
NUM_BLOCKS = 16
NULL = ModelConfig(path="unused", load_format="null")


def requests(seed: int) -> list[ScriptedRequest]:
    """Some with penalties, which count the tokens of their rows, and one with a list of tokens of its own."""
    random = Random(seed)
    made = [
        ScriptedRequest([random.randrange(16) for _ in range(random.randint(1, 20))], random.randint(1, 8))
        for _ in range(7)
    ]
    for request in made[::2]:
        request.adjustments = {"repetition_penalty": 1.5, "frequency_penalty": random.random()}
    made[1].adjustments = {"bad_words": [[random.randrange(16)]], "min_tokens": 3}
    return made


def run(
    executor: Executor, device: Any, ends: Ends, served: list[ScriptedRequest], max_steps: int | None = None
) -> None:
    """Run requests to their end. With `max_steps`, stop there, and leave the last of these steps under way."""
    scheduler = ScriptedScheduler(Random(1), SHAPE, NUM_BLOCKS, [ends.prompts])
    scheduler.waiting.extend(served)
    num_steps = in_flight = 0
    with torch.inference_mode():
        while not scheduler.is_idle:
            while in_flight < 2 and num_steps != max_steps and scheduler.plan(ends.steps.claim()):
                ends.steps.publish()
                assert executor.submit_next(time.monotonic_ns()) is not None, "the step was published"
                num_steps, in_flight = num_steps + 1, in_flight + 1
            if num_steps == max_steps:
                return
            device.synchronize(executor.under_way[0].outputs_done)
            executor.publish()
            result = ends.results.take()
            assert result is not None, "the result was published"
            scheduler.apply(result)
            ends.results.release_through(ends.results.next_ticket - 1)
            in_flight -= 1


def executor_on(device: Any, ends: Ends) -> Executor:
    return Executor(device, ToyModel(SHAPE, NUM_BLOCKS), SHAPE, 2, NUM_BLOCKS, ends.gpu)


@pytest.mark.parametrize("device", [CpuDevice(), SimulatedDevice(Random(0))])
def test_steps_from_new_rings_have_the_tokens_of_a_new_process_wherever_the_old_ones_broke_off(device: Any) -> None:
    expected = requests(seed=2)
    run(executor_on(CpuDevice(), undisturbed := Ends(SHAPE, 2)), CpuDevice(), undisturbed, expected)
    executor = executor_on(device, ends := Ends(SHAPE, 2))
    for num_steps in range(1, 12):
        run(executor, device, ends, requests(seed=num_steps), num_steps)
        assert executor.under_way
        with torch.inference_mode():
            device.settle()
        executor.replace_rings((ends := Ends(SHAPE, 2)).gpu)
        assert executor.stalled_s(time.monotonic_ns()) == 0, "a dropped step is watched"
    run(executor, device, ends, served := requests(seed=2))
    assert [request.tokens for request in served] == [request.tokens for request in expected]


def test_a_step_held_back_is_dropped_and_its_mask_is_not_taken_for_the_new_schedulers() -> None:
    engine = Engine()
    engine.plan(1)
    engine.plan(1)
    engine.answer(0, 1, 7)
    assert engine.submit() is not None
    engine.results()
    assert engine.submit() is None
    assert engine.executor.held_back is not None
    old_masks: Ring[MaskRecord] = engine.ends.masks[0]

    engine.replace_rings()
    assert engine.executor.held_back is None
    engine.plan(1)
    assert engine.submit() is None
    record = old_masks.claim()
    record.step[0], record.num_masks[0], record.masks[:] = 2, 1, -1
    old_masks.publish()
    assert engine.submit() is None, "a mask of the old ring was taken"
    engine.answer(0, 1, 9)
    assert engine.submit() is not None
    assert engine.results() == tokens(9)
    assert engine.is_released(0)


def is_mapped(address: int) -> bool:
    return f"{address:x}-" in Path("/proc/self/maps").read_text()


def test_the_results_of_steps_under_way_go_to_the_old_ring_which_is_unmapped_then() -> None:
    device, rung = LateWaiter(), []
    ends, new = Ends(SHAPE, 2), Ends(SHAPE, 2)
    old_step = np.frombuffer(ends.gpu.step.buffer, np.uint8).ctypes.data
    executor = executor_on(device, ends)
    completion = ResultPublisher(device, executor, ring_scheduler=lambda: rung.append("old"), wake=lambda: None)
    publish_step(ends.steps)
    with torch.inference_mode():
        step = executor.submit_next(0)
    assert step is not None
    completion.submitted(step)
    del step
    device.lets_go.set()
    completion.settle(DEADLINE_S)
    assert ends.results.is_published(1)
    assert is_mapped(old_step)
    executor.replace_rings(new.gpu)
    completion.ring_scheduler = lambda: rung.append("new")
    del ends.gpu
    assert not is_mapped(old_step)

    publish_step(new.steps)
    device.has_fired = True
    with torch.inference_mode():
        step = executor.submit_next(0)
    assert step is not None
    assert not new.results.is_published(1)
    completion.submitted(step)
    assert new.results.is_published(1)
    assert rung == ["old", "new"]


def test_a_device_that_does_not_finish_ends_the_wait_for_it_with_an_error() -> None:
    device, ends = LateWaiter(), Ends(SHAPE, 2)
    executor = executor_on(device, ends)
    completion = ResultPublisher(device, executor, ring_scheduler=lambda: None, wake=lambda: None)
    publish_step(ends.steps)
    with torch.inference_mode():
        step = executor.submit_next(0)
    assert step is not None
    completion.submitted(step)
    with pytest.raises(TimeoutError, match=r"steps under way within 0\.01 s"):
        completion.settle(0.01)
    device.lets_go.set()


class Rewired(FakeProcess):
    """Gets the next bootstrap when it has published `num_steps` results on the rings that it has."""

    def __init__(self, lives: list[Any]) -> None:
        super().__init__(lives[0].bootstrap.worker)
        self._lives = lives
        self._deadline = time.monotonic() + DEADLINE_S

    def on_rewire(self, take: Any) -> None:
        self._rewire = take

    def wait(self, timeout_ms: int | None = None) -> None:
        assert time.monotonic() < self._deadline, "no result came"
        if not self._lives[0].results.is_published(1):
            return
        self._lives.pop(0)
        if not self._lives:
            raise StopWorker
        self._rewire(self._lives[0].bootstrap)


def test_a_gpu_process_serves_one_scheduler_after_the_other() -> None:
    shape = replace(SHAPE, num_grammar_workers=2)
    with gpu_process(NULL, shape) as first, gpu_process(NULL, shape, epoch=2) as second:
        for life in (second, first):  # the new scheduler does not wait for the GPU process to look
            publish_step(life.steps)
            life.steps.layout.fields["mask_ticket"].of(life.steps.records[1])[:] = 0
        with pytest.raises(StopWorker):
            worker.run(Rewired([first, second]), first.bootstrap)  # type: ignore[arg-type]
        assert first.steps.num_unreleased == second.steps.num_unreleased == 0
        assert second.results.is_published(1)
