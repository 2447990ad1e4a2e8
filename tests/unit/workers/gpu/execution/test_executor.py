"""The executor and the thread behind it, on the CPU and on the timed device, driven by a scripted scheduler."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import pytest
import torch

from ipc.errors import RingError, RingFull
from ipc.mask_records import mask_layout
from ipc.record_layout import Layout, R
from ipc.records import PROMPT_RECORD_TOKENS, StepRecord, StepShape, prompt_layout, result_layout, step_layout
from ipc.ring import Ring, close_handle
from tests.simulation.harness import ToyModel
from tests.simulation.scripted import ScriptedRequest, ScriptedScheduler
from workers.gpu.device.clock import DriftingClock
from workers.gpu.device.cpu import CpuDevice
from workers.gpu.device.timed import TimedDevice
from workers.gpu.execution import kept_work
from workers.gpu.execution.buckets import Buckets
from workers.gpu.execution.executor import Executor
from workers.gpu.execution.kept_work import KeptWork
from workers.gpu.execution.null_model import NullModel
from workers.gpu.execution.result_publisher import ResultPublisher
from workers.gpu.execution.rings import GpuRings

SHAPE = StepShape(max_num_seqs=3, max_num_batched_tokens=16, max_model_len=32, block_size=4)
NUM_BLOCKS = 16
DEADLINE_S = 20.0

torch.set_num_threads(1)


class Ends:
    """Both ends of the rings: ours to write, and the executor's. The shape says how many mask rings there are."""

    def __init__(self, shape: StepShape, depth: int) -> None:
        def pair(name: str, layout: Layout[R], num_slots: int) -> tuple[Ring[R], Ring[R]]:
            ring = Ring.create(name, layout, num_slots, epoch=1)
            other = Ring.attach(ring.handle, layout)
            close_handle(ring.handle)
            return ring, other

        self.steps, steps = pair("step", step_layout(shape), 2 * depth)
        self.results, results = pair("result", result_layout(shape), 2 * depth)
        self.prompts, prompts = pair("prompt", prompt_layout(), 8)
        masks = [pair(f"mask.{i}", mask_layout(shape), 2 * depth) for i in range(shape.num_grammar_workers)]
        self.masks = [ours for ours, _ in masks]
        self.gpu = GpuRings(steps, results, [prompts], [theirs for _, theirs in masks])


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "nothing came"
        threading.Event().wait(0.001)


@contextmanager
def driven(executor: Executor, completion: ResultPublisher) -> Iterator[Callable[[], None]]:
    """Yields what lets the executor take all published steps, as the worker's loop does."""

    def take_steps() -> None:
        completion.check()
        while (step := executor.submit_next(time.monotonic_ns())) is not None:
            completion.submitted(step)

    with torch.inference_mode():
        yield take_steps


def serve(requests: list[ScriptedRequest], depth: int, device: Any, *, pad_batches: bool = False) -> None:
    """Run the requests to their end, with results published inline or by the completion thread."""
    ends, rung = Ends(SHAPE, depth), threading.Event()
    executor = Executor(
        device, ToyModel(SHAPE, NUM_BLOCKS), SHAPE, depth, NUM_BLOCKS, ends.gpu,
        buckets=Buckets(SHAPE) if pad_batches else None,
    )  # fmt: skip
    completion = ResultPublisher(device, executor, ring_scheduler=rung.set, wake=rung.set)
    scheduler = ScriptedScheduler(Random(depth), SHAPE, NUM_BLOCKS, [ends.prompts])
    scheduler.waiting.extend(requests)
    in_flight = 0
    with driven(executor, completion) as take_steps:
        while not scheduler.is_idle:
            while in_flight < depth and scheduler.plan(ends.steps.claim()):
                ends.steps.publish()
                in_flight += 1
            take_steps()
            if in_flight == depth:
                assert rung.wait(DEADLINE_S), "the scheduler's doorbell was not rung"
            rung.clear()
            while (result := ends.results.take()) is not None:
                assert 0 < result.device_start_ns[0] <= result.device_end_ns[0]
                assert result.received_at_ns[0] <= time.monotonic_ns()
                scheduler.apply(result)
                ends.results.release_through(ends.results.next_ticket - 1)
                in_flight -= 1
    wait_until(lambda: not executor.under_way)
    assert ends.gpu.step.read_cursor == ends.steps.next_ticket, "a step record was not released"


def requests(seed: int) -> list[ScriptedRequest]:
    random = Random(seed)
    return [
        ScriptedRequest([random.randrange(16) for _ in range(random.randint(1, 20))], random.randint(1, 8))
        for _ in range(7)
    ]


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("pad_batches", [False, True])
@pytest.mark.parametrize("device", [CpuDevice, TimedDevice])
def test_requests_get_the_models_own_tokens(depth: int, pad_batches: bool, device: Any) -> None:
    served = requests(depth)
    serve(served, depth, device(), pad_batches=pad_batches)
    for request in served:
        assert request.tokens == ToyModel.greedy(request.prompt, request.max_tokens)


def publish_step(ring: Ring[StepRecord], **fields: int) -> None:
    """A step of one sequence, row 0, one token, sampled; `fields` change that."""
    record = ring.claim()
    values = {"num_seqs": 1, "num_tokens": 1, "num_appends": 0, "num_admissions": 0, "variant": 0, "want_logprobs": 0,
              "seq_row": 0, "seq_num_tokens": 1, "seq_sample": 1, "admit_row": 0, "admit_ring": 0, "admit_ticket": 0,
              "admit_length": 0, "admit_num_computed_tokens": 0, "admit_max_len": 99}  # fmt: skip
    for name, value in (values | fields).items():
        ring.layout.fields[name].of(record)[0] = value
    ring.publish()


def test_a_prompt_longer_than_a_prompt_record_is_copied_from_all_its_records() -> None:
    shape = StepShape(1, 64, 2 * PROMPT_RECORD_TOKENS + 8, 16)
    ends, device = Ends(shape, 1), CpuDevice()
    executor = Executor(device, NullModel(shape, device.torch_device, lambda: None), shape, 1, 1000, ends.gpu)
    length = 2 * PROMPT_RECORD_TOKENS + 3
    for start in range(0, length, PROMPT_RECORD_TOKENS):
        ends.prompts.claim().token_ids[:] = range(start, start + PROMPT_RECORD_TOKENS)
        ends.prompts.publish()
    publish_step(ends.steps, num_admissions=1, admit_ticket=1, admit_length=length, seq_sample=0)
    with torch.inference_mode():
        executor.submit_next(0)
    assert executor.tables.token_ids[0, :length].tolist() == list(range(length))
    assert not executor.tables.token_ids[0, length:].any()


def test_an_admission_that_names_no_published_prompt_is_refused() -> None:
    ends, device = Ends(SHAPE, 1), CpuDevice()
    executor = Executor(device, ToyModel(SHAPE, NUM_BLOCKS), SHAPE, 1, NUM_BLOCKS, ends.gpu)
    publish_step(ends.steps, num_admissions=1, admit_ticket=3, admit_length=2)
    with torch.inference_mode(), pytest.raises(RingError, match="record 3 is not there"):
        executor.submit_next(0)


def test_a_step_without_room_for_its_result_is_refused() -> None:
    ends, device = Ends(SHAPE, 1), CpuDevice()
    executor = Executor(device, ToyModel(SHAPE, NUM_BLOCKS), SHAPE, 1, NUM_BLOCKS, ends.gpu)
    with torch.inference_mode():
        for _ in range(2):  # results that are not released fill their ring
            publish_step(ends.steps)
            executor.submit_next(0)
            executor.publish()
        publish_step(ends.steps)
        with pytest.raises(RingFull, match="before result 1 was read"):
            executor.submit_next(0)


def test_steps_overlap_on_the_timed_device_and_results_come_when_their_time_is_over() -> None:
    ends, device, rung = Ends(SHAPE, 2), TimedDevice(), threading.Event()
    step_ns = 30_000_000
    model = NullModel(SHAPE, device.torch_device, lambda: device.spend(step_ns))
    executor = Executor(device, model, SHAPE, 2, NUM_BLOCKS, ends.gpu)
    completion = ResultPublisher(device, executor, ring_scheduler=rung.set, wake=rung.set)
    with driven(executor, completion) as take_steps:
        publish_step(ends.steps, num_admissions=1)
        publish_step(ends.steps)
        take_steps()
        assert len(executor.under_way) == 2, "a step was waited for"
        wait_until(lambda: ends.results.is_published(2))
    assert rung.is_set()
    first, second = ends.results.record(1), ends.results.record(2)
    assert first.device_end_ns[0] - first.device_start_ns[0] == step_ns
    assert second.device_start_ns[0] == first.device_end_ns[0], "the device waited between two steps"
    assert time.monotonic_ns() >= second.device_end_ns[0]


class LateWaiter(CpuDevice):
    """Events fire when the test says so, and the thread that waits for one comes back when the test lets it."""

    def __init__(self) -> None:
        self.has_fired = False
        self.is_waited_for = threading.Event()
        self.lets_go = threading.Event()

    def query(self, event: Any) -> bool:
        return self.has_fired

    def synchronize(self, event: Any) -> None:
        self.is_waited_for.set()
        assert self.lets_go.wait(DEADLINE_S), "the test did not let go"


def test_a_step_that_is_done_at_once_is_not_published_while_the_thread_still_has_the_one_before_it() -> None:
    ends, device, rung = Ends(SHAPE, 2), LateWaiter(), threading.Event()
    executor = Executor(device, ToyModel(SHAPE, NUM_BLOCKS), SHAPE, 2, NUM_BLOCKS, ends.gpu)
    completion = ResultPublisher(device, executor, ring_scheduler=rung.set, wake=rung.set)
    with driven(executor, completion) as take_steps:
        publish_step(ends.steps)
        take_steps()
        assert device.is_waited_for.wait(DEADLINE_S)
        device.has_fired = True
        publish_step(ends.steps)
        take_steps()
        assert not ends.results.is_published(1), "two threads are at the executor's oldest step"
        assert not rung.is_set()
        device.lets_go.set()
        wait_until(lambda: not executor.under_way)
        completion.check()
    assert [ends.results.is_published(ticket) for ticket in (1, 2)] == [True, True]


class OwnTime(CpuDevice):
    """A device with its own clock, which it reads twice per step."""

    def __init__(self) -> None:
        self.times = [10, 20, 40, 70]
        self.clock = DriftingClock(0, time.monotonic_ns() - 1_000_000_000)

    def read_clock(self, stream: Any, target: torch.Tensor) -> None:
        target.fill_(self.times.pop(0))


def test_captured_work_is_captured_once_however_much_other_work_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_work, "_MAX_PLAIN_WORK", 2)
    captured: list[Callable[[], None]] = []
    plain: list[int] = []

    def make(size: int) -> Callable[[], None]:
        return lambda: plain.append(size)

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        captured.append(work)
        return work

    kept = KeptWork(make, capture, lambda size: size < 4)
    before = [kept(size) for size in range(4)]
    for size in range(4, 10):
        kept(size)()
    assert [kept(size) for size in range(4)] == before
    assert len(captured) == 4
    assert plain == [4, 5, 6, 7, 8, 9]


def test_results_say_in_the_hosts_time_when_the_device_worked() -> None:
    ends, device = Ends(SHAPE, 1), OwnTime()
    executor = Executor(device, ToyModel(SHAPE, NUM_BLOCKS), SHAPE, 1, NUM_BLOCKS, ends.gpu)
    times = []
    for _ in range(2):
        publish_step(ends.steps)
        with torch.inference_mode():
            executor.submit_next(0)
        executor.publish()
        result = ends.results.take()
        times += [int(result.device_start_ns[0]), int(result.device_end_ns[0])]
        ends.results.release_through(ends.results.next_ticket - 1)
    assert [at - times[0] for at in times] == [0, 10, 30, 60]
    assert 0 < time.monotonic_ns() - times[0] < 60_000_000_000


class BrokenDevice(TimedDevice):
    """Its second wait fails, as a device does that met an error in between."""

    def __init__(self) -> None:
        super().__init__()
        self.num_waits = 0

    def query(self, event: Any) -> bool:
        return False

    def synchronize(self, event: Any) -> None:
        self.num_waits += 1
        if self.num_waits == 2:
            raise RuntimeError("illegal memory access")


def test_an_error_while_waiting_for_results_wakes_the_main_thread_which_raises_it() -> None:
    ends, device, failed = Ends(SHAPE, 2), BrokenDevice(), threading.Event()
    executor = Executor(device, ToyModel(SHAPE, NUM_BLOCKS), SHAPE, 2, NUM_BLOCKS, ends.gpu)
    completion = ResultPublisher(device, executor, ring_scheduler=lambda: None, wake=failed.set)
    with driven(executor, completion) as take_steps:
        publish_step(ends.steps)
        publish_step(ends.steps)
        take_steps()
        assert failed.wait(DEADLINE_S)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            take_steps()
    assert ends.results.is_published(1)
    assert not ends.results.is_published(2)
