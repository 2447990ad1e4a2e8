"""The scheduler's process: carries messages and records between sockets, rings and the `Scheduler`.

                     ROUTER `schedule`, bound here
    tokenizers: Tokenized                      ------>
    gateway: Withdraw, CancelRequests,         ------>
             ClearCache                                   Scheduler
    detokenizer: CancelRequests (stop strings) ------>
    grammar processes: Compiled, MatcherFailed ------>
    gateway: Accepted, Withdrawn, CacheCleared <------
    grammar processes: Compile,                <------
             ReleaseMatchers
                     DEALER to `detokenize`
    detokenizer: StepOutputs                   <------
                     rings
    tokenizers: prompt rings 1 to N            ------>    (the scheduler releases their records)
    GPU process: result ring                   ------>    (the scheduler releases its records)
    GPU process: step ring                     <------    (the GPU process releases its records)
    GPU process: prompt ring 0, uploads        <------    (the scheduler releases its records)
    grammar processes: mask request rings,     <------    (the grammar process releases its records)
             one for each
                     control socket (`workers/process.py`)
    launcher: Start, Stop                      ------>
    launcher: Ready                            <------

The GPU process rings the scheduler's doorbell after it publishes a result. The scheduler rings the GPU process's after
it publishes a step, a tokenizer's after it releases prompt records, and a grammar process's after it asks for masks. It
sleeps until a message arrives, its doorbell rings, or a sequence runs out of time.
"""

from __future__ import annotations

import logging
from time import monotonic_ns, perf_counter_ns
from typing import Any, Final

from ipc.channels import send
from ipc.errors import EngineUnavailable
from ipc.mask_records import mask_request_layout
from ipc.messages import (
    EOS_TOKEN_ID,
    Start,
)
from ipc.records import prompt_layout, result_layout, step_layout
from ipc.trace import Span
from workers.bootstrap import RingEnd, WorkerBootstrap
from workers.process import WorkerProcess
from workers.scheduler.admission.prompt_rings import PromptRings
from workers.scheduler.config import SchedulerBootstrap
from workers.scheduler.inbox import Inbox
from workers.scheduler.outbox import Outbox
from workers.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)

RETRY_MS: Final = 50  # of messages to a process that is still connecting
MAX_SLEEP_MS: Final = 3_600_000  # zmq_poll refuses time-outs of months


def run(process: WorkerProcess, bootstrap: SchedulerBootstrap) -> None:
    """Schedule until the launcher says Stop."""
    schedule = process.bind("schedule")
    detokenizer = process.connect("detokenize")
    process.watch(schedule)
    first = bootstrap
    further, info = _await_start(process)
    bootstrap = [first, *further][-1]
    prompts = bootstrap.worker.rings["prompt"]
    scheduler = Scheduler(
        bootstrap.scheduler,
        bootstrap.shape,
        bootstrap.depth,
        info["num_blocks"],
        eos_token_ids(bootstrap.eos_token_ids, info),
        PromptRings([end.attach(prompt_layout()) for end in prompts]),
        mask_epoch=bootstrap.worker.ring("step").handle.epoch,
        restart_window_s=bootstrap.restart_window_s,
        mask_rings=[end.attach(mask_request_layout(bootstrap.shape)) for end in mask_request_ends(bootstrap)],
        grammar=bootstrap.grammar,
        recent_steps=process.stats.recent_steps,
    )
    steps = StepChannel(scheduler, process, bootstrap)
    outbox = Outbox(schedule)
    inbox = Inbox(schedule, scheduler, outbox, first.worker, process.take_bootstraps)
    for each in further:  # the gateway waits for the fence of each tokenizer that has died meanwhile
        inbox.rewire(each.worker)

    def rewire(new: SchedulerBootstrap) -> None:
        steps.rewire(new.worker)
        inbox.rewire(new.worker)

    process.on_rewire(rewire)
    trace, counters = process.trace, vars(process.stats)
    process.ready()
    while True:
        with trace[Span.RECEIVE]:
            inbox.take()
            scheduler.expire()
        steps.advance()
        with trace[Span.SEND]:
            while (outputs := scheduler.take_outputs()) is not None:
                send(detokenizer, outputs)
            for grammar, messages in scheduler.take_grammar_messages():
                outbox.add(inbox.grammars[grammar], messages)
            outbox.send()
        for ring in scheduler.prompts.take_freed_rings():
            prompts[ring].wake()
        gauges = scheduler.gauges()
        for name, value in gauges.items():
            counters[name][0] = value
        process.stats.num_upload_records[0] = scheduler.prompts.num_upload_records
        trace.gauge(Span.SEQUENCES, gauges["num_running"], gauges["num_waiting"])
        retry_ms = RETRY_MS if outbox else None
        process.wait(timeout_ms(scheduler, retry_ms))


def timeout_ms(scheduler: Scheduler, at_most_ms: int | None) -> int | None:
    """How long to sleep until the scheduler's next timer, or at most; None = until something arrives."""
    if scheduler.next_timer_ns is None:
        return at_most_ms
    due_ms = max(0, -(-(scheduler.next_timer_ns - monotonic_ns()) // 1_000_000))
    return min(MAX_SLEEP_MS, due_ms if at_most_ms is None else min(due_ms, at_most_ms))


def mask_request_ends(bootstrap: SchedulerBootstrap) -> list[RingEnd]:
    """The rings to the grammar processes, in the order of these."""
    return bootstrap.worker.rings.get("mask_request", [])


class StepChannel:
    """The step ring, which every GPU process reads, the result ring, and the rings to the grammar processes."""

    def __init__(self, scheduler: Scheduler, process: WorkerProcess, bootstrap: SchedulerBootstrap) -> None:
        self._scheduler = scheduler
        self._stats = process.stats
        self._trace = process.trace
        self._shape = bootstrap.shape
        self._mask_requests = mask_request_ends(bootstrap)
        self._use(bootstrap.worker)

    def _use(self, worker: WorkerBootstrap) -> None:
        steps, results = worker.ring("step"), worker.ring("result")
        self._steps = steps.attach(step_layout(self._shape))
        self._results = results.attach(result_layout(self._shape))
        self._wake_readers = steps.wake

    def rewire(self, worker: WorkerBootstrap) -> None:
        """If the GPU processes are new, so are the rings of steps and results in `worker`. The old ones are closed.

        The mask rings are as new as the ring of steps, and have its epoch.
        """
        if worker.ring("step").handle.epoch == self._steps.epoch:
            return
        was_ready = not any(name.partition(".")[0] == "gpu" for name in worker.died_starting)
        self._steps.close()
        self._results.close()
        self._use(worker)
        self._scheduler.replace_device(self._steps.epoch, was_ready=was_ready)

    def advance(self) -> None:
        """Apply all results that have arrived, then publish steps until credit or work runs out."""
        scheduler, stats, trace = self._scheduler, self._stats, self._trace
        started = perf_counter_ns()
        while (result := self._results.take()) is not None:
            ticket = self._results.next_ticket - 1
            with trace[Span.APPLY] as span:
                span.set(ticket)
                scheduler.apply(result)
            self._wake_grammars()
            if trace.is_on:
                start_ns, end_ns = int(result.device_start_ns[0]), int(result.device_end_ns[0])
                trace.record(Span.STEP, start_ns, end_ns - start_ns, ticket)
            self._results.release_through(ticket)
        trace.gauge(Span.STEP_RING, scheduler.num_in_flight)
        applied = perf_counter_ns()
        stats.apply_ns[0] += applied - started
        while scheduler.num_in_flight < scheduler.depth and scheduler.has_work:
            with trace[Span.PLAN] as span:
                record = self._steps.claim()
                if not scheduler.plan(record):
                    break
                span.set(self._steps.publish(), record.num_seqs[0], record.num_tokens[0])
            self._wake_readers()
        self._wake_grammars()
        trace.gauge(Span.STEP_RING, scheduler.num_in_flight)
        stats.num_step_records[0] = self._steps.num_unreleased
        stats.num_result_records[0] = self._steps.next_ticket - self._results.read_cursor
        stats.plan_ns[0] += perf_counter_ns() - applied

    def _wake_grammars(self) -> None:
        for grammar in self._scheduler.mask_requests.take_published():
            self._mask_requests[grammar].wake()


def _await_start(process: WorkerProcess) -> tuple[list[SchedulerBootstrap], dict[str, int]]:
    """Sleep until the launcher's Start arrives.

    Returns our further bootstraps, and the facts that the GPU process and the tokenizers have reported.
    """
    further: list[SchedulerBootstrap] = []
    starts: list[Start] = []

    def on_control(message: Any) -> None:
        if isinstance(message, Start):
            starts.append(message)

    process.on_control(on_control)
    process.on_rewire(further.append)
    while not starts:
        process.wait()
    num_blocks = starts[0].info.get("num_blocks", 0)
    if num_blocks < 1:
        raise EngineUnavailable(f"the GPU process reported {num_blocks} KV blocks; the scheduler needs at least 1")
    logger.info("scheduling with %d KV blocks", num_blocks)
    return further, starts[0].info


def eos_token_ids(of_model: list[int], info: dict[str, int]) -> list[int]:
    """The ids that end a sequence: the model's eos ids and the tokenizer's, the only ones that some fine-tunes set."""
    of_tokenizer = info.get(EOS_TOKEN_ID)
    if of_tokenizer is None or of_tokenizer in of_model:
        return of_model
    logger.info(
        "the tokenizer's eos_token (%d) also ends sequences, beside the model's eos ids %s", of_tokenizer, of_model
    )
    return [*of_model, of_tokenizer]
