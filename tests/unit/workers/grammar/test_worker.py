"""The grammar process's loop over a real socket, rings and doorbells; scheduler, GPU process and launcher are played
here."""

from __future__ import annotations

import gc
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
import numpy as np
import pytest
import zmq

from ipc.channels import receive_from, send_to
from ipc.doorbell import Doorbell
from ipc.mask_records import mask_layout, mask_request_layout
from ipc.messages import (
    Compile,
    Compiled,
    Ready,
    ReleaseMatchers,
    Start,
    Stop,
    ToScheduler,
    WorkerToLauncher,
)
from ipc.records import NO_TOKEN, StepShape
from ipc.ring import Ring, close_handle
from ipc.stats_page import StatsPage
from ipc.structured_outputs import StructuredOutputs
from tests.unit.workers.grammar.grammar_tools import END, TINY, VOCAB_SIZE, encode
from tests.unit.workers.private_sockets import PrivateSockets
from workers.bootstrap import RingEnd, WorkerBootstrap
from workers.grammar.config import COUNTERS, GrammarBootstrap
from workers.grammar.worker import GrammarWorker, run
from workers.process import StopWorker, WorkerProcess

SHAPE = StepShape(8, 32, 64, 4, vocab_size=VOCAB_SIZE, num_grammar_workers=1)
NUM_RECORDS = 4
EPOCH = 3  # of the mask ring
NAME = b"grammar.0@1"
DEADLINE_S = 10.0
WORD = StructuredOutputs(choice=["def", "class"])


class Surroundings:
    """A grammar process in a thread, and all its peers.

    `requests` were made before it was started, and its predecessor has answered `num_answered` of them: (epoch and
    ticket of the mask record, key).
    """

    def __init__(self, folder: Path, requests: Sequence[tuple[int, int, int]] = (), num_answered: int = 0) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.sockets = PrivateSockets(folder)
        self.control = self.sockets.bind(self.context, "control")
        self.scheduler = self.sockets.bind(self.context, "schedule")
        self.bells = {name: Doorbell.create() for name in ("grammar", "gpu")}
        self.requests = Ring.create("mask_request", mask_request_layout(SHAPE), NUM_RECORDS, 1)
        self.masks = Ring.create("mask", mask_layout(SHAPE), NUM_RECORDS, EPOCH)
        self.num_asked = 0
        for epoch, ticket, key in requests:
            self.ask((key, NO_TOKEN), epoch=epoch, ticket=ticket)
        for _ in range(num_answered):
            self.masks.claim()
            self.masks.publish()
        self.masks.next_ticket = 1  # we read it from here on
        stats = StatsPage.create("grammar.0", COUNTERS)
        self.stats = StatsPage(stats)
        common = WorkerBootstrap(
            role="grammar.0",
            listeners=self.sockets.listeners,
            sockets=self.sockets.sockets,
            rings={
                "mask_request": [RingEnd(handle=self.requests.handle)],
                "mask": [RingEnd(handle=self.masks.handle, writes=True, doorbells=[self.bells["gpu"].fd])],
            },
            doorbell_fd=self.bells["grammar"].fd,
            stats=stats,
            launcher_pid=os.getpid(),
        )
        self.common = common
        self.process = WorkerProcess(common)
        bootstrap = GrammarBootstrap(worker=common, model_path=str(TINY), shape=SHAPE, compile_timeout_s=5.0)
        self.in_wait: list[Callable[[], None]] = []  # what the process does next from within `wait`
        self.workers: list[GrammarWorker] = []
        wait = self.process.wait

        def wait_and_do(timeout_ms: int | None = None) -> set[Any]:
            ready = wait(timeout_ms)
            while self.in_wait:
                self.in_wait.pop()()
            return ready

        self.process.wait = wait_and_do  # type: ignore[method-assign]
        self.failure: BaseException | None = None
        self.switch_interval = sys.getswitchinterval()
        self.thread = threading.Thread(target=self._run, args=(bootstrap,))
        self.thread.start()
        self.launcher_heard: list[Any] = []
        self.heard: list[Any] = []
        self.until(lambda: self.launcher_heard == [Ready(role="grammar.0")])

    def _run(self, bootstrap: GrammarBootstrap) -> None:
        def serve(worker: GrammarWorker, serve: Callable[[GrammarWorker], None] = GrammarWorker.serve) -> None:
            self.workers.append(worker)
            serve(worker)

        try:
            with patch.object(GrammarWorker, "serve", serve):
                run(self.process, bootstrap)
        except StopWorker:
            pass
        except BaseException as error:
            self.failure = error

    def tell(self, message: Any) -> None:
        self.until(lambda: send_to(self.scheduler, NAME, message))

    def ask(self, *wanted: tuple[int, int], step: int = 7, epoch: int = EPOCH, ticket: int | None = None) -> int:
        """Ask for the masks of (key, newest token). Returns the ticket of the mask record."""
        self.num_asked = self.num_asked + 1 if ticket is None else ticket
        record = self.requests.claim()
        record.mask_epoch[0], record.mask_ticket[0] = epoch, self.num_asked
        record.step[0], record.num_masks[0] = step, len(wanted)
        for i, (key, token_id) in enumerate(wanted):
            record.key[i], record.token[i] = key, token_id
        self.requests.publish()
        self.bells["grammar"].ring()
        return self.num_asked

    def answer(self, ticket: int) -> tuple[int, list[list[int]]]:
        """The step of a mask record, and the tokens that each of its masks allows. Releases it."""
        self.until(lambda: self.masks.is_published(ticket))
        record = self.masks.record(ticket)
        bits = np.unpackbits(record.masks[: int(record.num_masks[0])].view(np.uint8), axis=1, bitorder="little")
        self.masks.release_through(ticket)
        return int(record.step[0]), [np.flatnonzero(row).tolist() for row in bits]

    def answer_in_a_new_ring(self, epoch: int, ticket: int) -> tuple[int, list[list[int]]]:
        """Replace the mask ring, as if the GPU process were a new one, and take an answer there."""
        close_handle(self.masks.handle)
        self.masks = Ring.create("mask", mask_layout(SHAPE), NUM_RECORDS, epoch)
        end = RingEnd(handle=self.masks.handle, writes=True, doorbells=[self.bells["gpu"].fd])
        worker = msgspec.structs.replace(self.common, rings={**self.common.rings, "mask": [end]})
        self.in_wait.append(lambda: self.workers[0].rewire(worker))
        self.bells["grammar"].ring()
        return self.answer(ticket)

    def until(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert self.failure is None, f"the grammar process ended: {self.failure!r}"
            assert time.monotonic() < deadline, f"nothing came of it in time; heard {self.heard}"
            select.select([self.bells["gpu"].fd], [], [], 0.001)
            self.launcher_heard += [message for _, message in receive_from(self.control, WorkerToLauncher)]
            self.heard += [message for _, message in receive_from(self.scheduler, ToScheduler)]

    def close(self) -> None:
        self.until(lambda: send_to(self.control, NAME, Stop()))
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive()
        self.process.close()
        gc.enable()  # a worker switches it off
        gc.unfreeze()
        sys.setswitchinterval(self.switch_interval)
        self.context.destroy(0)
        for ring in (self.requests, self.masks):
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


def test_a_sequence_is_followed_from_its_grammar_to_its_end(surroundings: Surroundings) -> None:
    surroundings.until(lambda: send_to(surroundings.control, NAME, Start()))
    surroundings.tell(Compile(key=1, num_samples=2, spec=WORD, end_ids=[END]))
    surroundings.until(lambda: surroundings.heard == [Compiled(key=1)])
    [define] = encode("def")
    step, (first, second) = surroundings.answer(surroundings.ask((1, NO_TOKEN), (2, NO_TOKEN), step=11))
    assert step == 11
    assert define in first
    assert first == second
    assert surroundings.bells["gpu"].drain(), "the GPU process was not woken"
    assert surroundings.answer(surroundings.ask((1, define), step=12)) == (12, [[END]])
    surroundings.tell(ReleaseMatchers(keys=[1, 2]))
    surroundings.until(lambda: surroundings.stats.snapshot()["num_matchers"] == 0)
    assert surroundings.answer(surroundings.ask((1, NO_TOKEN), (0, NO_TOKEN))) == (7, [])
    stats = surroundings.stats.snapshot()
    assert [stats[name] for name in ("num_compiled", "num_mask_records", "num_masks", "num_failed_matchers")] == [
        1, 3, 5, 0,
    ]  # fmt: skip
    assert surroundings.requests.num_unreleased == 0


def test_masks_wait_for_room_in_their_ring_and_keep_their_order(surroundings: Surroundings) -> None:
    for step in range(1, NUM_RECORDS + 1):
        surroundings.ask((0, NO_TOKEN), step=step)
    surroundings.until(lambda: surroundings.requests.num_unreleased == 0)
    late = [surroundings.ask((0, NO_TOKEN), step=step) for step in (10, 11)]
    surroundings.masks.next_ticket = NUM_RECORDS + 1
    assert not surroundings.masks.is_published(late[0])
    assert [surroundings.answer(ticket)[0] for ticket in range(1, NUM_RECORDS + 1)] == [1, 2, 3, 4]
    assert [surroundings.answer(ticket)[0] for ticket in late] == [10, 11]


def test_a_new_process_answers_what_its_predecessor_left_with_no_masks(tmp_path: Path) -> None:
    left = [(EPOCH - 1, 5, 1), (EPOCH, 1, 1), (EPOCH, 2, 1)]
    surroundings = Surroundings(tmp_path, left, num_answered=1)
    try:
        assert surroundings.answer(2) == (7, [])
        surroundings.until(lambda: surroundings.requests.num_unreleased == 0)
        assert not surroundings.masks.is_published(3)
        assert surroundings.answer(surroundings.ask((0, NO_TOKEN))) == (7, [[]]), "a mask that does not matter"
        assert surroundings.heard == []
    finally:
        surroundings.close()


def test_tokens_on_their_way_when_the_gpu_process_dies_reach_their_matchers(surroundings: Surroundings) -> None:
    surroundings.until(lambda: send_to(surroundings.control, NAME, Start()))
    surroundings.tell(Compile(key=1, num_samples=1, spec=WORD, end_ids=[END]))
    surroundings.until(lambda: surroundings.heard == [Compiled(key=1)])
    [define] = encode("def")
    surroundings.ask((1, define), epoch=EPOCH - 1, ticket=9)
    assert surroundings.answer(surroundings.ask((1, NO_TOKEN), ticket=1)) == (7, [[END]])
    surroundings.ask((1, END), epoch=EPOCH + 1, ticket=1)
    assert surroundings.answer_in_a_new_ring(EPOCH + 1, 1) == (7, [[END]])
    assert surroundings.requests.num_unreleased == 0
