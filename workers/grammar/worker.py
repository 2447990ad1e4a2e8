"""The grammar process: its socket, its rings and its loop. core.py decides what it answers.

                     DEALER to `schedule`
    scheduler: Compile, ReleaseMatchers  ------>
    scheduler: Compiled, MatcherFailed   <------
                     rings
    scheduler: mask_request              ------>    (this process releases its records)
    GPU process: mask                    <------    (the GPU process releases its records)

Masks come first: the device may be waiting for them. Grammars are compiled on other threads.

The mask ring is as old as the GPU process, and the ring of requests is older. Every request advances matchers. Which
mask record it gets depends on the mask ring that it names:

    an older ring       none: the GPU process that waited for it has died
    the present ring    the record that it names, unless a predecessor of this process has published that
    a newer ring        it waits until this process has the new ring
"""

from __future__ import annotations

import gc
import sys
from time import perf_counter_ns
from typing import Final

from ipc.channels import receive, send
from ipc.mask_records import MaskRequestRecord, mask_layout, mask_request_layout
from ipc.messages import Compile, SchedulerToGrammar, Start
from ipc.trace import Span
from workers.bootstrap import RingEnd, WorkerBootstrap
from workers.grammar.config import GrammarBootstrap
from workers.grammar.core import GrammarCore
from workers.grammar.vocabulary import Vocabulary
from workers.process import WorkerProcess

MAX_MESSAGES: Final = 16  # received between two looks at the requests for masks
FULL_RING_MS: Final = 1  # between two looks at a mask ring without room
SWITCH_INTERVAL_S: Final = 0.0005  # for how long a compiling thread may hold the interpreter while masks are owed


def run(process: WorkerProcess, bootstrap: GrammarBootstrap) -> None:
    """Serve until Stop."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)

    def load() -> Vocabulary:
        vocabulary = Vocabulary.of_folder(bootstrap.model_path, bootstrap.shape.vocab_size)
        gc.collect()
        gc.freeze()  # as after `process.ready`: no later collection looks at it
        return vocabulary

    core = GrammarCore(load, process.doorbell.ring, compile_timeout_s=bootstrap.compile_timeout_s)
    worker = GrammarWorker(process, bootstrap, core)
    process.on_control(lambda message: core.start_loading() if isinstance(message, Start) else None)
    process.on_rewire(lambda new: worker.rewire(new.worker))
    if bootstrap.worker.epoch > 1:
        core.finish_loading()  # a process that is ready may begin with a grammar: a death from now on makes suspects
    process.ready()
    worker.serve()


class GrammarWorker:
    """One process's ends of its socket and its rings."""

    def __init__(self, process: WorkerProcess, bootstrap: GrammarBootstrap, core: GrammarCore) -> None:
        self._process = process
        self._core = core
        self._scheduler = process.connect("schedule")
        process.watch(self._scheduler)
        self._shape = bootstrap.shape
        self._requests = bootstrap.worker.ring("mask_request").attach(mask_request_layout(bootstrap.shape))
        self._asked_ns: dict[int, int] = {}  # by the request's key: when its Compile arrived
        self._use(bootstrap.worker.ring("mask"))

    def rewire(self, worker: WorkerBootstrap) -> None:
        """If the GPU process is a new one, write masks to the new ring from now on."""
        masks = worker.ring("mask")
        if masks.handle.epoch != self._masks.epoch:
            self._masks.close()
            self._use(masks)

    def _use(self, masks: RingEnd) -> None:
        self._masks = masks.attach(mask_layout(self._shape))
        self._wake_gpu = masks.wake

    def serve(self) -> None:
        """Serve until Stop."""
        while True:
            has_room = self._answer_requests()
            self._take_messages()
            self._send_answers()
            self._process.wait(self._timeout_ms(has_room))

    def _answer_requests(self) -> bool:
        """Take the requests for masks in their order. False: the mask ring has no room for more.

        The GPU process releases the records that it has not waited for, too, so room comes. If it has died, a new ring
        comes instead.
        """
        requests, masks = self._requests, self._masks
        while requests.is_published(requests.next_ticket):
            request = requests.record(requests.next_ticket)
            epoch, ticket = int(request.mask_epoch[0]), int(request.mask_ticket[0])
            if epoch > masks.epoch:  # we hear of the new ring soon
                return True
            is_wanted = epoch == masks.epoch and ticket >= masks.next_ticket
            if is_wanted and not masks.num_free():
                return False
            n = int(request.num_masks[0])
            keys, token_ids = request.key[:n].tolist(), request.token[:n].tolist()
            if is_wanted:
                assert ticket == masks.next_ticket, f"masks {masks.next_ticket} are due, and {ticket} are asked for"
                self._answer(request, keys, token_ids)
            else:
                self._core.follow(keys, token_ids)
            requests.release_through(requests.next_ticket)
            requests.next_ticket += 1
        return True

    def _answer(self, request: MaskRequestRecord, keys: list[int], token_ids: list[int]) -> None:
        """Write and publish the masks that a request asks for."""
        masks, stats, n = self._masks, self._process.stats, len(keys)
        started = perf_counter_ns()
        with self._process.trace[Span.MASK] as span:
            record = masks.claim()
            for failure in self._core.fill(keys, token_ids, record.masks):
                send(self._scheduler, failure)  # before the closed mask, so that the scheduler knows the reason
                stats.num_failed_matchers[0] += 1
            record.step[0] = request.step[0]
            record.num_masks[0] = n if self._core.knows_some(keys) else 0
            ticket = masks.publish()
            self._wake_gpu()
            span.set(ticket, n)
        stats.num_mask_records[0] += 1
        stats.num_masks[0] += n
        stats.mask_ns[0] += perf_counter_ns() - started

    def _take_messages(self) -> None:
        for message in receive(self._scheduler, SchedulerToGrammar, MAX_MESSAGES):
            if isinstance(message, Compile):
                self._asked_ns[message.key] = perf_counter_ns()
                self._core.compile(message)
            else:
                self._core.release(message.keys)

    def _send_answers(self) -> None:
        stats = self._process.stats
        for answer in self._core.take_answers():
            send(self._scheduler, answer)
            stats.num_compiled[0] += not answer.error_code
            stats.num_compile_errors[0] += bool(answer.error_code)
            stats.compile_ns[0] += perf_counter_ns() - self._asked_ns.pop(answer.key)
        stats.num_matchers[0] = self._core.num_matchers

    def _timeout_ms(self, has_room: bool) -> int | None:
        if not has_room:
            return FULL_RING_MS
        deadline_s = self._core.next_deadline_s()
        return None if deadline_s is None else int(deadline_s * 1e3) + 1
