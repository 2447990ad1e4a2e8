"""A busy scheduler, GPU process and detokenizer collect no garbage: a step leaves as many containers as it found.

`workers/process.py` collects in a busy process only after MAX_UNCOLLECTED new containers. Under steady load their
number stays where it is, so that never happens. Only the requests that are open at the same time add to it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import pytest
import torch

from ipc.messages import ClientCredit
from ipc.records import FinishCode, StepShape
from ipc.sampling_params import SamplingParams
from tests.simulation.scheduled_engine import ScheduledEngine
from tests.unit.workers.detokenizer.test_detokenizer import DECODING, opened, step
from tests.unit.workers.gpu.execution.test_executor import Ends, publish_step
from workers.detokenizer.core import Detokenizer
from workers.gpu.device.cpu import CpuDevice
from workers.gpu.execution.executor import Executor
from workers.gpu.execution.null_model import NullModel
from workers.gpu.execution.result_publisher import ResultPublisher
from workers.process import MAX_UNCOLLECTED

NUM_STEPS = 100
MANY_OPEN = 200


def new_containers(work: Callable[[int], None], num_before: int, count: int) -> int:
    """By how much `count` calls raise the number that WorkerProcess looks at, after `num_before` other calls."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for i in range(num_before):
            work(i)
        before = gc.get_count()[0]
        for i in range(num_before, num_before + count):
            work(i)
        return gc.get_count()[0] - before
    finally:
        gc.enable()
        gc.unfreeze()


def gpu_process() -> Callable[[int], None]:
    shape = StepShape(max_num_seqs=3, max_num_batched_tokens=16, max_model_len=4096, block_size=16)
    ends, device = Ends(shape, 2), CpuDevice()
    model = NullModel(shape, device.torch_device, lambda: None)
    executor = Executor(device, model, shape, 2, 16, ends.gpu)
    completion = ResultPublisher(device, executor, ring_scheduler=lambda: None, wake=lambda: None)

    def work(_: int) -> None:
        publish_step(ends.steps)
        submitted = executor.submit_next(time.monotonic_ns())
        assert submitted is not None
        completion.submitted(submitted)
        assert ends.results.take() is not None
        ends.results.release_through(ends.results.next_ticket - 1)

    return work


def scheduler() -> Callable[[int], None]:
    engine = ScheduledEngine(max_num_seqs=32, max_num_batched_tokens=64, num_blocks=4_000)

    def work(i: int) -> None:
        engine.send(2 * i, [i % 50, 1, 2, 3], SamplingParams(max_tokens=10))
        engine.step()
        for kept in (engine.opened, engine.tokens, engine.ends, engine.cached, engine.admitted_ns):
            if len(kept) > 40:
                kept.pop(next(iter(kept)))

    return work


def detokenizer() -> Callable[[int], None]:
    core = Detokenizer(DECODING, client_window=64)
    keys: list[int] = []

    def work(i: int) -> None:
        core.handle(step(opened=[opened(2 * i)]))
        keys.append(2 * i)
        core.handle(step([(key, 30 + key % 20, FinishCode.RUNNING) for key in keys]))
        if len(keys) > 20:
            core.handle(step([(keys.pop(0), 40, FinishCode.LENGTH)]))
        num_frames = sum(len(frames) for _, frames in core.deliveries())
        core.handle(ClientCredit(client=b"c", count=num_frames))

    return work


@pytest.mark.parametrize("busy", [gpu_process, scheduler, detokenizer])
def test_steps_leave_as_many_containers_as_they_found(busy: Callable[[], Callable[[int], None]]) -> None:
    with torch.inference_mode():
        assert new_containers(busy(), NUM_STEPS, NUM_STEPS) < 20


def test_twenty_thousand_more_open_requests_are_too_few_for_a_collection() -> None:
    engine = ScheduledEngine(max_num_seqs=32, max_num_waiting=10 * MANY_OPEN, prompt_records=2 * MANY_OPEN)
    core = Detokenizer(DECODING, client_window=64)

    def schedule(i: int) -> None:
        engine.send(2 * i, [1], SamplingParams(max_tokens=10))

    def open_stream(i: int) -> None:
        core.handle(step(opened=[opened(2 * i)]))

    for open_one in (schedule, open_stream):
        assert 0 < new_containers(open_one, 0, MANY_OPEN) * 20_000 / MANY_OPEN < MAX_UNCOLLECTED
