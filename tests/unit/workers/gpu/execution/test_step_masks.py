"""Steps that owe masks: how long they are held back, which masks count as closed, and what else goes on meanwhile."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from ipc.records import NO_TOKEN, FinishCode, SamplerVariant, StepShape
from ipc.trace import Span
from tests.reference.gpu_process import gpu_process
from tests.simulation.harness import ToyModel
from tests.unit.workers.gpu.execution.test_executor import DEADLINE_S, Ends, LateWaiter, wait_until
from workers.gpu import worker
from workers.gpu.config import COUNTERS, ModelConfig
from workers.gpu.device.cpu import CpuDevice
from workers.gpu.execution.buckets import Buckets
from workers.gpu.execution.executor import Executor
from workers.gpu.execution.model_runner import ModelRunner
from workers.gpu.execution.result_publisher import ResultPublisher
from workers.gpu.execution.steps import Submitted
from workers.process import StopWorker

SHAPE = StepShape(
    max_num_seqs=4, max_num_batched_tokens=16, max_model_len=32, block_size=4, vocab_size=40, num_grammar_workers=2
)
NUM_BLOCKS = 16
MS = 1_000_000
TIMEOUT_NS = 100 * MS


class WideToyModel(ToyModel):
    vocab_size = SHAPE.vocab_size


class Engine:
    """An executor whose time the test sets, and the other ends of its rings: the scheduler's and two grammar
    workers'."""

    def __init__(
        self,
        device: Any = None,
        *,
        depth: int = 2,
        shape: StepShape = SHAPE,
        runner: ModelRunner | None = None,
        buckets: Buckets | None = None,
    ) -> None:
        self.now_ns = 5 * MS
        self.ends = Ends(shape, depth)
        self._size = shape, depth
        self.device = device or CpuDevice()
        self.executor = Executor(
            self.device, runner or WideToyModel(shape, NUM_BLOCKS), shape, depth, NUM_BLOCKS, self.ends.gpu,
            buckets=buckets, mask_timeout_s=TIMEOUT_NS * 1e-9, monotonic_ns=lambda: self.now_ns,
        )  # fmt: skip
        self._mask_tickets = [0, 0]

    def replace_rings(self) -> None:
        self.ends = Ends(*self._size)
        self.device.settle()
        self.executor.replace_rings(self.ends.gpu)
        self._mask_tickets = [0, 0]

    def plan(self, *num_masks: int, num_free: int = 0) -> None:
        """A step with so many masks of each worker, and with sequences without a mask behind them."""
        record = self.ends.steps.claim()
        num_seqs = sum(num_masks) + num_free
        record.num_seqs[0] = record.num_tokens[0] = num_seqs
        record.num_appends[0] = record.num_admissions[0] = record.want_logprobs[0] = 0
        record.variant[0] = SamplerVariant.ADJUSTED if num_masks else SamplerVariant.GREEDY
        record.seq_row[:num_seqs] = range(num_seqs)
        record.seq_num_tokens[:num_seqs] = record.seq_sample[:num_seqs] = 1
        record.seq_mask[:num_seqs] = [*range(sum(num_masks)), *[-1] * num_free]
        record.mask_ticket[:] = record.num_masks[:] = 0
        for i, num in enumerate(num_masks):
            if num:
                self._mask_tickets[i] += 1
                record.mask_ticket[i], record.num_masks[i] = self._mask_tickets[i], num
        self.ends.steps.publish()

    def answer(self, grammar_worker: int, step: int, *tokens: int) -> None:
        """A mask record in which each mask allows one token."""
        ring = self.ends.masks[grammar_worker]
        record = ring.claim()
        record.step[0], record.num_masks[0] = step, len(tokens)
        record.masks[:] = 0
        for i, token in enumerate(tokens):
            record.masks[i, token // 32] = torch.tensor(1 << token % 32).to(torch.int32).item()
        ring.publish()

    def submit(self) -> Submitted | None:
        with torch.inference_mode():
            return self.executor.submit_next(self.now_ns)

    def results(self) -> list[tuple[int, FinishCode]]:
        """Publish the oldest step and return its tokens."""
        num_seqs = self.executor.under_way[0].num_seqs
        self.device.synchronize(self.executor.under_way[0].outputs_done)
        self.executor.publish()
        record = self.ends.results.take()
        assert record is not None
        found = [(int(record.token_ids[i]), FinishCode(int(record.finish[i]))) for i in range(num_seqs)]
        self.ends.results.release_through(self.ends.results.next_ticket - 1)
        return found

    def is_released(self, grammar_worker: int) -> bool:
        return not self.ends.masks[grammar_worker].num_unreleased


def tokens(*expected: int) -> list[tuple[int, FinishCode]]:
    return [(token, FinishCode.EXCLUDED if token == NO_TOKEN else FinishCode.RUNNING) for token in expected]


def test_a_step_waits_for_the_masks_of_every_worker_and_later_steps_wait_behind_it() -> None:
    engine = Engine()
    engine.plan(2, 1)
    engine.plan(num_free=1)
    assert engine.submit() is None
    held = engine.executor.held_back
    assert held is not None
    assert held.ticket == 1
    engine.answer(1, 1, 33)
    assert engine.submit() is None
    assert not engine.executor.under_way, "a step is under way whose second half is not enqueued"
    assert engine.ends.gpu.step.next_ticket == 2, "the step behind it was taken"
    engine.now_ns += 3 * MS
    engine.answer(0, 1, 31, 0)
    step = engine.submit()
    assert step is not None
    assert (step.mask_wait_ns, step.num_closed_masks) == (3 * MS, 0)
    assert engine.executor.held_back is None
    later = engine.submit()
    assert later is not None
    assert later.ticket == 2
    assert engine.results() == tokens(31, 0, 33)
    assert engine.is_released(0)
    assert engine.is_released(1)


def test_a_step_whose_masks_are_there_first_is_enqueued_at_once() -> None:
    engine = Engine()
    engine.answer(0, 1, 7)
    engine.plan(1)
    assert engine.submit() is not None
    assert engine.results() == tokens(7)


def test_a_mask_is_closed_exactly_when_its_time_after_the_result_before_it_is_over() -> None:
    engine = Engine()
    engine.plan(num_free=1)
    engine.plan(1, 1, num_free=1)
    assert engine.submit() is not None
    assert engine.submit() is None
    engine.now_ns += 7 * TIMEOUT_NS
    assert engine.executor.mask_deadline_ns is None, "the result before it is not published"
    assert engine.submit() is None
    engine.results()
    deadline_ns = engine.now_ns + TIMEOUT_NS
    assert engine.executor.mask_deadline_ns == deadline_ns
    engine.answer(1, 2, 35)
    engine.now_ns = deadline_ns - 1
    assert engine.submit() is None
    engine.now_ns = deadline_ns
    step = engine.submit()
    assert step is not None
    assert (step.mask_wait_ns, step.num_closed_masks) == (TIMEOUT_NS, 1)
    closed, open_, free = engine.results()
    assert [closed, open_] == tokens(NO_TOKEN, 35)
    assert engine.ends.results.records[2 % engine.ends.results.num_slots].closed_masks.tolist() == [1, 0]
    assert free[0] != NO_TOKEN


def test_the_time_counts_from_the_first_half_if_that_comes_last() -> None:
    engine = Engine()
    engine.plan(num_free=1)
    engine.submit()
    engine.results()
    engine.now_ns += 9 * TIMEOUT_NS
    engine.plan(1)
    assert engine.submit() is None
    assert engine.executor.mask_deadline_ns == engine.now_ns + TIMEOUT_NS


def test_late_records_are_released_when_they_come_and_never_used() -> None:
    engine = Engine(depth=2)
    for step in (1, 2, 3):
        engine.plan(1)
        assert engine.submit() is None
        engine.now_ns += TIMEOUT_NS
        assert engine.submit() is not None
        assert engine.results() == tokens(NO_TOKEN), f"step {step}"
    engine.answer(0, 1, 5)
    engine.answer(0, 2, 6)
    assert engine.submit() is None
    assert engine.is_released(0)
    engine.plan(1)
    engine.answer(0, 3, 7)
    assert engine.submit() is None, "step 4 took the masks of step 3"
    assert engine.is_released(0)
    engine.answer(0, 4, 8)
    assert engine.submit() is not None
    assert engine.results() == tokens(8)
    assert engine.is_released(0)


def test_a_record_without_masks_counts_as_closed_and_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine()
    engine.plan(2)
    engine.answer(0, 1)
    submitted = engine.submit()
    assert submitted is not None
    assert submitted.num_closed_masks == 2
    assert engine.results() == tokens(NO_TOKEN, NO_TOKEN)
    assert not caplog.records
    assert engine.is_released(0)


@pytest.mark.parametrize(("step", "allowed"), [(2, [5, 6]), (0, [5, 6]), (1, [5]), (1, [5, 6, 7])])
def test_a_record_of_another_step_or_number_of_masks_counts_as_closed(
    step: int, allowed: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine()
    engine.plan(2)
    engine.answer(0, step, *allowed)
    submitted = engine.submit()
    assert submitted is not None
    assert submitted.num_closed_masks == 2
    assert engine.results() == tokens(NO_TOKEN, NO_TOKEN)
    (line,) = caplog.records
    assert line.levelno == logging.ERROR
    assert f"holds {len(allowed)} masks of step {step}, not 2 masks of step 1" in line.getMessage()
    engine.plan(2)
    engine.answer(0, 1, 5, 6)
    engine.submit()
    assert len(caplog.records) == 1, "it was reported twice"
    assert engine.results() == tokens(NO_TOKEN, NO_TOKEN)
    assert engine.is_released(0)


def test_a_step_that_owes_masks_which_its_sampler_would_ignore_is_refused() -> None:
    engine = Engine()
    engine.plan(1)
    engine.ends.steps.records[1].variant[0] = SamplerVariant.FILTERED
    engine.answer(0, 1, 9)
    with pytest.raises(AssertionError, match="step 1 owes masks, and FILTERED reads none"):
        engine.submit()


class CallRecorder(CpuDevice):
    """Remembers what is enqueued where."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []

    def copy(self, stream: Any, target: torch.Tensor, source: torch.Tensor) -> None:
        self.calls.append(("copy", stream))
        super().copy(stream, target, source)

    def launch(self, stream: Any, work: Callable[[], None], accesses: Any) -> None:
        self.calls.append(("launch", stream))
        super().launch(stream, work, accesses)

    def read_clock(self, stream: Any, target: torch.Tensor) -> None:
        self.calls.append(("read_clock", stream))
        super().read_clock(stream, target)

    def record(self, event: Any, stream: Any) -> None:
        self.calls.append(("record", stream, event))

    def wait(self, stream: Any, event: Any) -> None:
        self.calls.append(("wait", stream, event))


def test_a_step_without_masks_enqueues_the_same_whether_there_are_grammar_workers_or_not() -> None:
    enqueued = []
    for num_workers in (0, 2):
        device = CallRecorder()
        engine = Engine(device, shape=replace(SHAPE, num_grammar_workers=num_workers))
        engine.plan(num_free=2)
        device.calls.clear()
        engine.submit()
        enqueued.append(device.calls)
    assert enqueued[0] == enqueued[1]
    assert enqueued[0] == [
        ("copy", "copy_in"),
        ("record", "copy_in", "inputs_ready.1"),
        ("wait", "compute", "inputs_ready.1"),
        ("read_clock", "compute"),
        ("copy", "compute"),
        ("launch", "compute"),
        ("launch", "compute"),
        ("read_clock", "compute"),
        ("copy", "compute"),
        ("record", "compute", "step_done.1"),
        ("wait", "copy_out", "step_done.1"),
        ("copy", "copy_out"),
        ("record", "copy_out", "outputs_done.1"),
    ]


def test_a_gpu_process_attaches_to_the_mask_rings_of_its_shapes_grammar_workers_in_their_order() -> None:
    for num_workers in (0, 2):
        shape = replace(SHAPE, num_grammar_workers=num_workers)
        with gpu_process(ModelConfig(path="unused", load_format="null"), shape) as gpu:
            masks = worker.attach_rings(gpu.bootstrap).masks
            assert [ring.name for ring in masks] == [f"mask.{i}" for i in range(num_workers)]


# With the thread that publishes


def test_the_publishing_thread_wakes_the_launching_thread_only_for_a_step_held_back() -> None:
    device, woken = LateWaiter(), threading.Event()
    engine = Engine(device)
    completion = ResultPublisher(device, engine.executor, ring_scheduler=lambda: None, wake=woken.set)
    engine.answer(0, 2, 9)
    engine.plan(num_free=1)
    step = engine.submit()
    assert step is not None
    completion.submitted(step)
    engine.plan(1)
    assert engine.submit() is None
    assert not woken.is_set()
    device.lets_go.set()
    assert woken.wait(DEADLINE_S), "nobody looks at the step held back any more"
    held = engine.submit()
    assert held is not None, "it was woken before the result was published"
    woken.clear()
    completion.submitted(held)
    wait_until(lambda: not engine.executor.under_way)
    assert not woken.is_set()


class SlowToDrop:
    """Steps under way. The thread that drops one waits until the test lets it."""

    def __init__(self) -> None:
        self.steps: list[Submitted] = []
        self.is_dropping = threading.Event()
        self.lets_go = threading.Event()

    def __getitem__(self, index: int) -> Submitted:
        return self.steps[index]

    def append(self, step: Submitted) -> None:
        self.steps.append(step)

    def popleft(self) -> None:
        self.is_dropping.set()
        assert self.lets_go.wait(DEADLINE_S), "the test did not let go"
        del self.steps[0]


def test_a_second_half_enqueued_while_the_thread_drops_the_step_before_is_published_by_the_thread() -> None:
    device = LateWaiter()
    engine = Engine(device)
    under_way: Any = SlowToDrop()
    engine.executor.under_way = under_way
    completion = ResultPublisher(device, engine.executor, ring_scheduler=lambda: None, wake=lambda: None)
    engine.plan(num_free=1)
    first = engine.submit()
    assert first is not None
    completion.submitted(first)
    engine.plan(1)
    assert engine.submit() is None
    device.lets_go.set()
    assert under_way.is_dropping.wait(DEADLINE_S)
    engine.answer(0, 2, 12)
    second = engine.submit()
    assert second is not None, "its result is published, so the step behind it may go on"
    device.has_fired = True
    completion.submitted(second)
    assert not engine.ends.results.is_published(2), "two threads publish at once"
    under_way.lets_go.set()
    wait_until(lambda: not under_way.steps)
    completion.check()
    assert engine.ends.results.record(2).token_ids[0] == 12
    assert engine.is_released(0)


class Script:
    """A worker process: whenever it would sleep, the next act of the test's script happens instead."""

    def __init__(self, acts: Iterator[None], stats: Any) -> None:
        self.stats = stats
        self.trace: Any = self
        self.timeouts_ms: list[int | None] = []
        self.launches: list[int] = []
        self.missing: list[int] = []
        self._acts = acts

    def record(self, kind: int, start_ns: int, duration_ns: int, ticket: int, *_: int) -> None:
        assert kind == Span.LAUNCH
        self.launches.append(ticket)

    def gauge(self, kind: int, value: int) -> None:
        assert kind == Span.MISSING_MASKS
        self.missing.append(value)

    def wait(self, timeout_ms: int | None = None) -> None:
        self.timeouts_ms.append(timeout_ms)
        if next(self._acts, self) is self:
            raise StopWorker


def test_the_loop_sleeps_until_the_masks_deadline_and_counts_what_it_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    stats = type("Stats", (), {name: [0] for name in COUNTERS})()
    monkeypatch.setattr(worker.time, "monotonic_ns", lambda: engine.now_ns)

    def acts() -> Iterator[None]:
        engine.plan(2, 1)
        yield
        engine.now_ns += 40 * MS + 1
        yield
        engine.answer(1, 1, 20)
        engine.now_ns += 60 * MS
        yield

    process: Any = Script(acts(), stats)
    completion = ResultPublisher(engine.device, engine.executor, ring_scheduler=lambda: None, wake=lambda: None)
    with torch.inference_mode(), pytest.raises(StopWorker):
        worker.run_steps(process, engine.executor, completion)
    assert process.timeouts_ms == [None, 100, 60, 0]
    assert process.launches == [1, 1], "each half is launched once"
    assert process.missing == [3, 0]
    assert (stats.num_steps, stats.num_late_masks) == ([1], [2])
    assert stats.mask_wait_ns == [100 * MS + 1]
    assert engine.ends.results.record(1).token_ids[:3].tolist() == [NO_TOKEN, NO_TOKEN, 20]
