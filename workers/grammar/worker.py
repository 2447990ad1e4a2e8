"""The grammar process: its socket, its rings and its loop. core.py decides what it answers.

                     DEALER to `schedule`
    scheduler: Compile, ReleaseMatchers  ------>
    scheduler: Compiled, MatcherFailed   <------
                     rings
    scheduler: mask_request              ------>    (this process releases its records)
    GPU process: mask                    <------    (the GPU process releases its records)

Masks come first: the device may be waiting for them. Grammars are compiled on other threads.
"""

from __future__ import annotations

import gc
import sys
from time import perf_counter_ns
from typing import Final

from ipc.channels import receive, send
from ipc.mask_records import mask_layout, mask_request_layout
from ipc.messages import Compile, SchedulerToGrammar, Start
from ipc.trace import Span
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
    process.ready()
    worker.serve()


class GrammarWorker:
    """One process's ends of its socket and its rings."""

    def __init__(self, process: WorkerProcess, bootstrap: GrammarBootstrap, core: GrammarCore) -> None:
        self._process = process
        self._core = core
        self._scheduler = process.connect("schedule")
        process.watch(self._scheduler)
        requests, masks = bootstrap.worker.ring("mask_request"), bootstrap.worker.ring("mask")
        self._requests = requests.attach(mask_request_layout(bootstrap.shape))
        self._masks = masks.attach(mask_layout(bootstrap.shape))
        self._wake_gpu = masks.wake
        self._asked_ns: dict[int, int] = {}  # by the request's key: when its Compile arrived
        while self._requests.next_ticket < self._masks.next_ticket:  # a predecessor has answered these
            self._requests.take()
            self._requests.release_through(self._requests.next_ticket - 1)

    def serve(self) -> None:
        """Serve until Stop."""
        while True:
            has_room = self._answer_requests()
            self._take_messages()
            self._send_answers()
            self._process.wait(self._timeout_ms(has_room))

    def _answer_requests(self) -> bool:
        """Answer each request for masks with the record of the same ticket. False: the mask ring has no room for more.

        The GPU process releases the records that it has not waited for, too, so room comes.
        """
        requests, masks, stats = self._requests, self._masks, self._process.stats
        while requests.is_published(requests.next_ticket):
            if not masks.num_free():
                return False
            started = perf_counter_ns()
            with self._process.trace[Span.MASK] as span:
                request, record = requests.take(), masks.claim()
                assert request is not None, "a published record can be taken"
                n = int(request.num_masks[0])
                keys, token_ids = request.key[:n].tolist(), request.token[:n].tolist()
                for failure in self._core.fill(keys, token_ids, record.masks):
                    send(self._scheduler, failure)  # before the closed mask, so that the scheduler knows the reason
                    stats.num_failed_matchers[0] += 1
                record.step[0] = request.step[0]
                record.num_masks[0] = n
                ticket = masks.publish()
                assert ticket == requests.next_ticket - 1, f"masks {ticket} answer request {requests.next_ticket - 1}"
                self._wake_gpu()
                span.set(ticket, n)
            requests.release_through(ticket)
            stats.num_mask_records[0] += 1
            stats.num_masks[0] += n
            stats.mask_ns[0] += perf_counter_ns() - started
        return True

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
