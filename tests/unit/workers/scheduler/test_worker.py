"""The scheduler's process loop over real sockets, rings and doorbells; all the other processes are played here."""

from __future__ import annotations

import gc
import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from ipc.channels import receive, receive_from, send, send_to
from ipc.doorbell import Doorbell
from ipc.messages import (
    EOS_TOKEN_ID,
    Accepted,
    CancelRequests,
    Fenced,
    Ready,
    Route,
    SchedulerToGateway,
    Start,
    Stop,
    ToDetokenizer,
    Tokenized,
    Withdraw,
    Withdrawn,
    WorkerToLauncher,
)
from ipc.records import StepShape, prompt_layout, result_layout, step_layout
from ipc.ring import Ring, close_handle
from ipc.sampling_params import SamplingParams
from ipc.stats_page import StatsPage
from tests.simulation.fake_gpu import FakeGpu, expected_tokens
from tests.unit.workers.private_sockets import PrivateSockets
from workers.bootstrap import RingEnd, WorkerBootstrap
from workers.process import StopWorker, WorkerProcess
from workers.scheduler.config import ARRAYS, COUNTERS, SchedulerBootstrap, SchedulerConfig
from workers.scheduler.worker import eos_token_ids, run

SHAPE = StepShape(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=64, block_size=4)
NUM_BLOCKS = 64
DEPTH = 2
DEADLINE_S = 10.0


class Surroundings:
    """A scheduler in a thread, and all its peers."""

    def __init__(self, folder: Path) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.sockets = PrivateSockets(folder)
        self.control = self.sockets.bind(self.context, "control")
        self.detokenizer = self.sockets.bind(self.context, "detokenize")
        self.bells = {name: Doorbell.create() for name in ("scheduler", "gpu", "tokenizer")}
        self.steps = Ring.create("step", step_layout(SHAPE), 2 * DEPTH, 1)
        self.results = Ring.create("result", result_layout(SHAPE), 2 * DEPTH, 1)
        self.prompts = [Ring.create(f"prompt.{i}", prompt_layout(), 8, 1) for i in range(2)]
        self.gpu = FakeGpu(SHAPE, NUM_BLOCKS, self.prompts)
        stats = StatsPage.create("scheduler", COUNTERS, ARRAYS)
        self.stats = StatsPage(stats)
        common = WorkerBootstrap(
            role="scheduler",
            listeners=self.sockets.listeners,
            sockets=self.sockets.sockets,
            peers={"gateway": [b"gateway@1"], "tokenizer": [b"tokenizer.0@1"]},
            rings={
                "step": [RingEnd(handle=self.steps.handle, writes=True, doorbells=[self.bells["gpu"].fd])],
                "result": [RingEnd(handle=self.results.handle)],
                "prompt": [
                    RingEnd(handle=self.prompts[0].handle, writes=True),
                    RingEnd(handle=self.prompts[1].handle, doorbells=[self.bells["tokenizer"].fd]),
                ],
            },
            doorbell_fd=self.bells["scheduler"].fd,
            stats=stats,
            launcher_pid=os.getpid(),
        )
        self.process = WorkerProcess(common)
        self.in_wait: list[Callable[[], None]] = []  # what the process does next from within `wait`
        self.rewirings: list[Callable[[Any], None]] = []  # what it does with a further bootstrap
        self.process.on_rewire = self.rewirings.append  # type: ignore[method-assign]
        wait = self.process.wait

        def wait_and_do(timeout_ms: int | None = None) -> set[Any]:
            ready = wait(timeout_ms)
            while self.in_wait:
                self.in_wait[0]()
                self.in_wait.pop(0)
            return ready

        self.process.wait = wait_and_do  # type: ignore[method-assign]
        self.bootstrap = SchedulerBootstrap(
            worker=common,
            scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=64),
            shape=SHAPE,
            depth=DEPTH,
            eos_token_ids=[],
        )
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        self.gateway = self.sockets.connect(self.context, "schedule", b"gateway@1")
        self.tokenizer = self.sockets.connect(self.context, "schedule", b"tokenizer.0@1")
        self.heard: list[Any] = []  # StepOutputs
        self.accepted: list[int] = []
        self.answers: list[Any] = []  # to the gateway

    def _run(self) -> None:
        try:
            run(self.process, self.bootstrap)
        except StopWorker:
            pass
        except BaseException as error:
            self.failure = error

    def start(self) -> None:
        self.until(lambda: send_to(self.control, b"scheduler@1", Start(info={"num_blocks": NUM_BLOCKS})))
        messages: list[Any] = []

        def is_ready() -> bool:
            messages.extend(message for _, message in receive_from(self.control, WorkerToLauncher))
            return bool(messages)

        self.until(is_ready)
        assert messages == [Ready(role="scheduler")]

    def send(self, key: int, prompt: list[int], max_tokens: int) -> None:
        ring = self.prompts[1]
        ring.claim().token_ids[: len(prompt)] = prompt
        ticket = ring.publish()
        send(
            self.tokenizer,
            Tokenized(
                key=key,
                route=Route(client=b"c", request_id=str(key), stream=True),
                params=SamplingParams(max_tokens=max_tokens),
                ring=1,
                ticket=ticket,
                num_prompt_tokens=len(prompt),
                arrived_ns=time.monotonic_ns(),
            ),
        )

    def look(self) -> None:
        """Run what the GPU process would, take what has come."""
        if self.bells["gpu"].drain():
            while self.take_step():
                self.answer_step()
        self.heard += [message for _, message in receive_from(self.detokenizer, ToDetokenizer)]
        for message in receive(self.gateway, SchedulerToGateway):
            self.answers.append(message)
            if isinstance(message, Accepted):
                self.accepted += message.keys

    def take_step(self) -> bool:
        record = self.steps.take()
        if record is not None:
            self.gpu.submit(record)
            self.steps.release_through(self.steps.next_ticket - 1)
        return record is not None

    def answer_step(self) -> None:
        self.gpu.run_next(self.results.claim())
        self.results.publish()
        self.bells["scheduler"].ring()

    def replace_gpu(self) -> None:
        """The GPU process dies, and a new one has new rings."""
        old = [self.steps.handle, self.results.handle]
        self.steps = Ring.create("step", step_layout(SHAPE), 2 * DEPTH, self.steps.epoch + 1)
        self.results = Ring.create("result", result_layout(SHAPE), 2 * DEPTH, self.steps.epoch)
        self.gpu = FakeGpu(SHAPE, NUM_BLOCKS, self.prompts)
        new = {
            "step": [RingEnd(handle=self.steps.handle, writes=True, doorbells=[self.bells["gpu"].fd])],
            "result": [RingEnd(handle=self.results.handle)],
        }
        self.rewire(rings={**self.bootstrap.worker.rings, **new})
        for handle in old:
            close_handle(handle)

    def rewire(self, **changed: Any) -> None:
        """Another process was started again: the scheduler gets a bootstrap that differs in this."""
        worker = msgspec.structs.replace(self.bootstrap.worker, **changed)
        self.bootstrap = msgspec.structs.replace(self.bootstrap, worker=worker)
        self.in_wait.append(lambda: self.rewirings[-1](self.bootstrap))
        self.bells["scheduler"].ring()
        self.until(lambda: not self.in_wait)

    def counters(self, *names: str) -> tuple[float, ...]:
        counters = self.stats.snapshot()
        return tuple(counters[name] for name in names)

    def until(self, condition: Any) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert self.failure is None, f"the scheduler ended: {self.failure!r}"
            assert time.monotonic() < deadline, "nothing came of it in time"
            select.select([self.bells["gpu"].fd], [], [], 0.001)

    def tokens_of(self, key: int) -> list[int]:
        self.look()
        found: list[int] = []
        for outputs in self.heard:
            keys = np.frombuffer(outputs.keys, np.int64)
            found += np.frombuffer(outputs.token_ids, np.int32)[keys == key].tolist()
        return found

    def close(self) -> None:
        self.until(lambda: send_to(self.control, b"scheduler@1", Stop()))
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive()
        self.process.close()
        gc.enable()  # a worker switches it off
        gc.unfreeze()
        self.context.destroy(0)
        for ring in (self.steps, self.results, *self.prompts):
            close_handle(ring.handle)
        for bell in self.bells.values():
            bell.close()


@pytest.fixture
def surroundings(tmp_path: Path) -> Iterator[Surroundings]:
    made = Surroundings(tmp_path)
    try:
        yield made
    finally:
        made.close()


def test_requests_go_in_and_their_tokens_come_out(surroundings: Surroundings) -> None:
    surroundings.start()
    prompts = {key: [key, key + 1, key + 2] for key in range(1, 8)}  # more than rows
    for key, prompt in prompts.items():
        surroundings.send(key, prompt, 5)
    for key, prompt in prompts.items():
        expected = expected_tokens(prompt, 0, 8, [])
        surroundings.until(lambda key=key, expected=expected: surroundings.tokens_of(key) == expected)
    assert [opened.key for outputs in surroundings.heard for opened in outputs.opened] == list(prompts)
    surroundings.until(lambda: surroundings.look() or surroundings.accepted == list(prompts))


def test_the_gateway_can_cancel_and_the_detokenizer_hears_of_it(surroundings: Surroundings) -> None:
    surroundings.start()
    surroundings.send(1, [1], 60)
    surroundings.until(lambda: surroundings.look() or surroundings.accepted == [1])
    send(surroundings.gateway, CancelRequests(keys=[1, 2]))

    def ended() -> list[tuple[int, str]]:
        surroundings.look()
        return [(end.key, end.finish_reason) for outputs in surroundings.heard for end in outputs.ended]

    surroundings.until(lambda: ended() or len(surroundings.tokens_of(1)) == 60)
    assert ended() == [(1, "cancelled")] or len(surroundings.tokens_of(1)) == 60


def test_the_gateway_hears_of_an_arrival_before_it_hears_that_the_request_is_not_open(
    surroundings: Surroundings,
) -> None:
    surroundings.start()
    send(surroundings.gateway, Withdraw(keys=[2]))
    surroundings.until(lambda: surroundings.look() or surroundings.answers == [Withdrawn(keys=[2])])
    surroundings.answers.clear()
    surroundings.send(2, [2], 1)
    surroundings.send(1, [1], 1)
    surroundings.until(lambda: len(surroundings.tokens_of(1)) == 1 and surroundings.accepted == [1])
    surroundings.until(lambda: surroundings.stats.snapshot()["num_finished"] == 1)
    send(surroundings.gateway, Withdraw(keys=[1]))
    surroundings.until(lambda: surroundings.look() or Withdrawn(keys=[1]) in surroundings.answers)
    assert surroundings.answers == [Accepted(keys=[1]), Withdrawn(keys=[1])]
    assert [opened.key for outputs in surroundings.heard for opened in outputs.opened] == [1]
    surroundings.until(surroundings.bells["tokenizer"].drain)
    assert surroundings.prompts[1].num_free() == 8


def test_the_tokenizer_is_woken_when_its_records_are_free_and_the_counters_say_what_happened(
    surroundings: Surroundings,
) -> None:
    surroundings.start()
    surroundings.send(1, [1, 2, 3], 2)
    surroundings.until(lambda: len(surroundings.tokens_of(1)) == 2)
    surroundings.until(surroundings.bells["tokenizer"].drain)
    assert surroundings.prompts[1].num_free() == 8
    surroundings.until(lambda: surroundings.stats.snapshot()["num_finished"] == 1)
    counters = surroundings.stats.snapshot()
    assert counters["num_steps"] == 2
    assert counters["num_sampled_tokens"] == 2
    assert counters["num_prompt_tokens"] == 3
    assert counters["num_free_blocks"] == NUM_BLOCKS
    assert counters["num_free_rows"] == SHAPE.max_num_seqs
    assert counters["num_step_records"] == counters["num_result_records"] == 0
    assert counters["plan_ns"] > 0
    assert counters["apply_ns"] > 0
    assert counters["device_busy_ns"] == 200


def test_requests_go_on_with_a_new_gpu_process(surroundings: Surroundings) -> None:
    surroundings.start()
    for key in (1, 2):
        surroundings.send(key, [key, 5, 6], 20)
    for num_results in (3, 0, 5):
        for _ in range(num_results):
            surroundings.until(lambda: surroundings.take_step() or surroundings.gpu.num_submitted)
            surroundings.answer_step()  # the last results are not applied, or just so
        surroundings.replace_gpu()
    for key in (1, 2):
        expected = expected_tokens([key, 5, 6], 0, 23, [])
        surroundings.until(lambda key=key, expected=expected: surroundings.tokens_of(key) == expected)
    surroundings.until(lambda: surroundings.counters("num_free_rows", "num_upload_records") == (SHAPE.max_num_seqs, 0))
    assert surroundings.counters("num_preemptions", "num_free_blocks") == (0, NUM_BLOCKS)


def test_tokenizers_that_die_before_the_scheduler_has_started_are_fenced_all_the_same(
    surroundings: Surroundings,
) -> None:
    for epoch in (1, 2):
        surroundings.send(epoch, [7, 7], 2)  # by a tokenizer that dies before it is heard
        surroundings.rewire(
            peers={**surroundings.bootstrap.worker.peers, "tokenizer": [f"tokenizer.0@{epoch + 1}".encode()]}
        )
    surroundings.start()
    fences = [Fenced(tokenizer=b"tokenizer.0@1"), Fenced(tokenizer=b"tokenizer.0@2")]
    surroundings.until(lambda: surroundings.look() or surroundings.answers == fences)
    assert surroundings.prompts[1].num_free() == 8
    surroundings.until(lambda: surroundings.bells["tokenizer"].drain())  # the new tokenizer may be waiting for room


def test_the_counters_say_what_rows_and_rings_hold_until_the_gpu_process_answers(surroundings: Surroundings) -> None:
    def held() -> tuple[float, ...]:
        return surroundings.counters("num_free_rows", "num_step_records", "num_result_records")

    num_rows = SHAPE.max_num_seqs
    surroundings.start()
    surroundings.send(1, [1, 2, 3], 2)
    surroundings.until(lambda: held() == (num_rows - 1, DEPTH, DEPTH))
    while surroundings.take_step():
        pass
    surroundings.answer_step()
    surroundings.until(lambda: held() == (num_rows - 1, 0, DEPTH - 1))
    surroundings.answer_step()
    surroundings.until(lambda: held() == (num_rows, 0, 0))


def test_the_counter_says_what_the_upload_ring_holds_until_its_prompts_are_copied(surroundings: Surroundings) -> None:
    uploads, prompts = surroundings.prompts

    def num_uploaded() -> int:
        tickets = range(uploads.read_cursor, uploads.read_cursor + uploads.num_slots)
        return sum(uploads.is_published(ticket) for ticket in tickets)

    def answer_steps_until(condition: Callable[[], bool]) -> None:
        def has_come() -> bool:
            surroundings.take_step()
            if condition():  # before its answer gives back what the step holds
                return True
            if surroundings.gpu.num_submitted:
                surroundings.answer_step()
            return False

        surroundings.until(has_come)

    def are_in(num_running: int, num_waiting: int) -> bool:
        return surroundings.counters("num_running", "num_waiting") == (num_running, num_waiting)

    surroundings.start()
    for key in range(1, 9):  # twice as many as rows, and as many as records
        surroundings.send(key, [key], 60)
    answer_steps_until(lambda: are_in(4, 4) and prompts.num_free() >= 4)
    for key in range(9, 13):  # more than half of their ring is prompts that wait: those in front lose their place
        surroundings.send(key, [key], 60)
    answer_steps_until(lambda: are_in(4, 8))
    send(surroundings.gateway, CancelRequests(keys=[1, 2, 3, 4]))
    answer_steps_until(lambda: num_uploaded() > 0)
    surroundings.until(lambda: surroundings.counters("num_upload_records") == (num_uploaded(),))
    assert num_uploaded() > 0
    send(surroundings.gateway, CancelRequests(keys=list(range(5, 13))))
    answer_steps_until(lambda: are_in(0, 0) and surroundings.counters("num_upload_records") == (0,))


@pytest.mark.parametrize(("of_model", "info", "expected"), [
    ([0], {EOS_TOKEN_ID: 2}, [0, 2]),
    ([0, 2], {EOS_TOKEN_ID: 2}, [0, 2]),
    ([], {EOS_TOKEN_ID: 0}, [0]),
    ([5], {}, [5]),
])  # fmt: skip
def test_sequences_end_at_the_models_eos_ids_and_at_the_tokenizers(
    of_model: list[int], info: dict[str, int], expected: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        assert eos_token_ids(of_model, info) == expected
    assert ("the tokenizer's eos_token" in caplog.text) == (expected != of_model)


def test_an_idle_scheduler_does_not_wake_up(surroundings: Surroundings) -> None:
    surroundings.start()
    surroundings.send(1, [1], 1)
    surroundings.until(lambda: len(surroundings.tokens_of(1)) == 1 and surroundings.accepted == [1])
    surroundings.until(lambda: surroundings.stats.snapshot()["num_finished"] == 1)
    before = surroundings.stats.snapshot()["num_wakeups"]
    assert select.select([surroundings.bells["gpu"].fd], [], [], 0.3) == ([], [], [])
    assert surroundings.stats.snapshot()["num_wakeups"] - before <= 1  # heartbeats are ZeroMQ's own threads' affair
