"""Decides which sequences run next. Knows no tensors, no sockets and no processes.

A request is what the client asked for; each of its samples is a sequence. The life of a sequence, and the package or
module of each stage:

    add -> parked -> waiting                                         grammar_workers.py, admission/
           only with structured outputs: until their grammar is compiled
    add -> waiting -> running <-> preempted                                         admission/, planning/
                         |  ^ every step: tokens and KV blocks for each sequence    planning/, kv_cache/
                         |  ^ every result: a sampled token                         results/, output_buffer.py
                      planned out (all its tokens are planned; its blocks are free) -> end -> row retired -> row free

Batching is continuous, at the level of iterations: each step computes one token of every decoding sequence and, with
the tokens that are left, parts of prompts. Steps are planned up to `depth` ahead of their results, under the assumption
that no sequence stops early. If one does, the results of its later steps are void (`SequenceTable.generation`).
If the GPU process dies, every sequence with a row is preempted, and goes on in its successor (`replace_device`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from ipc.errors import ConfigError, Interrupted, RequestFailed
from ipc.long_values import max_long_words
from ipc.mask_records import MaskRequestRecord
from ipc.messages import (
    Compiled,
    MatcherFailed,
    SchedulerToGrammar,
    StepOutputs,
    Tokenized,
)
from ipc.record_layout import HostArray
from ipc.records import ResultRecord, StepRecord, StepShape
from ipc.ring import Ring
from workers.queueing.policies import make_policy
from workers.scheduler.admission.admission import Admission, Arrival
from workers.scheduler.admission.probation import Probation
from workers.scheduler.admission.prompt_rings import PromptRings
from workers.scheduler.admission.request_checks import RequestChecks
from workers.scheduler.admission.waiting_queue import WaitingQueue
from workers.scheduler.config import GrammarLimits, SchedulerConfig
from workers.scheduler.endings import Endings
from workers.scheduler.grammar_workers import GrammarWorkers
from workers.scheduler.kv_cache.kv_cache import KVCache
from workers.scheduler.open_sequences import OpenSequences
from workers.scheduler.output_buffer import OutputBuffer
from workers.scheduler.planning.chunk_limit import ChunkLimit
from workers.scheduler.planning.mask_requests import MaskRequests
from workers.scheduler.planning.planner import Planner
from workers.scheduler.planning.step import PlannedStep
from workers.scheduler.results.step_results import StepResults
from workers.scheduler.results.step_times import StepTimes
from workers.scheduler.sequence_table import SequenceTable

COUNTS: Final = (
    "num_steps", "num_prefill_steps", "num_sampled_tokens", "num_prompt_tokens", "num_admitted", "num_finished",
    "num_cancelled", "num_refused", "num_queue_full", "num_deadline", "num_queue_timeout", "num_not_finite",
    "num_preemptions", "num_cached_tokens", "num_excluded", "num_structured_unfinished",
)  # fmt: skip
GRAMMAR_DIED: Final = "the grammar process of this request has died"
GUILTY: Final = "this request failed: its computation has ended the GPU process twice; do not send it unchanged again"
_DEFAULT_LIMITS: Final = GrammarLimits()


class Scheduler:
    """Plans steps into records and applies their results, both in ticket order, from 1."""

    def __init__(
        self,
        config: SchedulerConfig,
        shape: StepShape,
        depth: int,
        num_blocks: int,
        eos_token_ids: list[int],
        prompts: PromptRings,
        clock: Callable[[], int] = time.monotonic_ns,
        *,
        mask_rings: Iterable[Ring[MaskRequestRecord]] = (),
        mask_epoch: int = 1,
        grammar: GrammarLimits = _DEFAULT_LIMITS,
        restart_window_s: float = 300.0,
        recent_steps: HostArray | None = None,
    ) -> None:
        if not prompts.can_upload(shape.max_model_len, max_long_words(shape) if shape.vocab_size else 0):
            raise ConfigError(
                f"the upload ring has no room for a prompt of scheduler.max_model_len ({shape.max_model_len}) tokens "
                "and its long values: it could not be sent again; give the prompt rings more records"
            )
        self.depth = depth
        self.prompts = prompts
        self.counts = dict.fromkeys(COUNTS, 0)
        self._clock = clock
        self._table = SequenceTable(shape.max_num_seqs, shape.max_blocks_per_seq, shape.block_size)
        self._kv_cache = KVCache(shape, num_blocks, self._table)
        self._open = OpenSequences(config.queue_timeout_s, clock)
        self._outputs = OutputBuffer()
        self._grammar_workers = GrammarWorkers(shape.num_grammar_workers, grammar.compile_timeout_s, clock, self._table)
        self.mask_requests = MaskRequests(mask_rings, self._table, mask_epoch)
        checks = RequestChecks(
            shape.max_model_len, shape.block_size, num_blocks, config.max_num_waiting, shape.max_num_seqs,
        )  # fmt: skip
        queue = WaitingQueue(config, make_policy(config, shape.max_num_seqs), clock)
        self._probation = Probation(restart_window_s, self._table, clock)
        self._admission = Admission(
            checks, queue, self._probation, prompts, self._table, self._open, self._grammar_workers, eos_token_ids,
            self._outputs, self.counts, clock,
        )  # fmt: skip
        self._chunk_limit = ChunkLimit(None if config.max_itl_ms is None else config.max_itl_ms / 1e3)
        self._planner = Planner(
            shape, self._table, self._kv_cache, self._admission, self.mask_requests, self._chunk_limit, self.counts,
            clock,
        )  # fmt: skip
        self._endings = Endings(self._open, self._admission, self._table, self._planner, self._outputs, self.counts)
        self._results = StepResults(self._table, self._outputs, self.counts, grammar.mask_timeout_s)
        self._step_times = StepTimes(recent_steps)
        self._in_flight: deque[tuple[PlannedStep, int]] = deque()  # with `_work_since_ns` when each was planned
        self._work_since_ns = 0  # since when there has always been something to plan

    # Arrivals and ends

    def add(self, message: Tokenized) -> Arrival:
        """Take in a tokenized request, with all its samples: see `Arrival` for what may become of it."""
        had_work = self.has_work
        arrival = self._admission.add(message)
        if arrival is Arrival.QUEUED and not had_work:
            self._work_since_ns = self._clock()
        has_to_wait = arrival is Arrival.QUEUED and self.num_in_flight >= self.depth  # until a step has been applied
        if has_to_wait or arrival is Arrival.PARKED:
            self.prompts.release_waiting()
        return arrival

    def compiled(self, worker: int, message: Compiled) -> None:
        """A grammar process has compiled a request's grammar, or has refused it."""
        had_work = self.has_work
        sequences = self._grammar_workers.compiled(worker, message.key)
        if message.error_code:
            self._endings.fail(sequences, message.error_code, message.error_message)
            return
        self._admission.unpark(sequences)
        if sequences and not had_work:
            self._work_since_ns = self._clock()

    def lose_grammar_worker(self, worker: int, *, was_ready: bool = True) -> None:
        """A new grammar process takes the place of one that has died, whose sequences are interrupted.

        If the dead one `was_ready`, one of them may be the cause.
        """
        followed = self._open.followed_by(worker)
        suspects, others = self._grammar_workers.lose(worker, followed, was_ready=was_ready)
        self._endings.fail(suspects, Interrupted.code, GRAMMAR_DIED, suspected=True)
        self._endings.fail(others, Interrupted.code, GRAMMAR_DIED)

    def matcher_failed(self, message: MatcherFailed) -> None:
        """A grammar process cannot follow a sequence any more. Keys without an open sequence are ignored."""
        text = f"the grammar of this request cannot be followed any more: {message.reason}"
        self.counts["num_excluded"] += self._endings.fail(self._open.find([message.key]), RequestFailed.code, text)

    def withdraw(self, keys: list[int]) -> list[int]:
        """Drop those of these requests on arrival that are not open now, without telling the detokenizer.

        Returns their keys. These include requests that have arrived and ended already: the gateway cancels those later.
        """
        return self._admission.withdraw(keys)

    def cancel(self, keys: list[int]) -> None:
        """End sequences now. Tokens of steps in flight for them are dropped. Ignores keys without a sequence."""
        self._admission.forget_withdrawn(keys)
        self.counts["num_cancelled"] += self._endings.early(self._open.find(keys), "cancelled")

    def expire(self) -> None:
        """End the sequences whose time has run out. They keep the tokens that they have got."""
        for sequence, reason in self._open.expired():
            self.counts[f"num_{reason}"] += self._endings.early([sequence], reason)
        if silent := self._grammar_workers.expired():
            self._endings.fail(silent, Interrupted.code, self._grammar_workers.silence)

    def clear_cache(self) -> None:
        """Sequences that are admitted from now on find no block that was filled before."""
        self._kv_cache.prefixes.clear()

    # Steps

    def plan(self, record: StepRecord) -> bool:
        """Fill a step record with what runs next; the caller publishes it. False: nothing can run, nothing is written.

        The caller keeps to the credit of `depth` steps in flight.
        """
        assert self.num_in_flight < self.depth, f"{self.num_in_flight} steps are in flight already"
        step = self._planner.plan(record)
        self.prompts.release_waiting()  # sequences that still wait do so until the next step, at least
        if step is None:
            return False
        self._in_flight.append((step, self._work_since_ns))
        if step.masks is not None and len(self._in_flight) == 1:
            self.mask_requests.send(step)
        return True

    def apply(self, result: ResultRecord) -> None:
        """Apply the result record of the oldest step in flight. Keeps no reference to it."""
        started_ns = self._clock()
        step, work_since_ns = self._in_flight.popleft()
        ends = self._results.apply(step, result)
        if ends is not None:
            for sequence in ends.not_finite:  # one that shares its blocks already computes the same, so it fails too
                self._kv_cache.prefixes.withdraw(sequence)
            self._endings.unfinished(ends.not_finite)
            self._endings.unfinished(ends.excluded)
            self._endings.finished(ends.finished)
        if self._in_flight and (oldest := self._in_flight[0][0]).masks is not None:
            self.mask_requests.send(oldest)
        self._table.step_applied(step.ticket)
        for lease in step.leases:
            self.prompts.release(lease)
        device_s = self._step_times.add(step, work_since_ns, result, started_ns, self._clock())
        self._chunk_limit.add_step(step.num_prompt_tokens, device_s)

    def replace_device(self, epoch: int, *, was_ready: bool = True) -> None:
        """The GPU process has died, and a new one reads the next steps, from ticket 1, in rings of this epoch.

        `was_ready`: the dead one had started, so that a sequence may be the cause of its death.

        The steps in flight are void. Every sequence with a row waits to be resumed. Its row keeps its ids, which are
        sent again, and so are its long values. Its keys and values are computed again.
        """
        for step, _ in self._in_flight:
            batch = step.batch
            is_open = self._table.generation[batch.rows] == batch.generations
            self._admission.queue.void(batch.rows[is_open & step.samples])
            for lease in step.leases:
                self.prompts.release(lease)
        self._in_flight.clear()
        owners = sorted(filter(None, self._table.sequences), key=lambda each: (each.rank, each.key))
        guilty = self._probation.device_died(owners, was_ready)
        self._endings.fail([each for each in self._open if each.request_key in guilty], RequestFailed.code, GUILTY)
        self._planner.replace_device()
        self._kv_cache.reset()
        self._admission.replace_device(self._table.replace_device())
        self.mask_requests.replace_rings(epoch)
        self._step_times.replace_device()
        self._work_since_ns = self._clock()

    def take_outputs(self) -> StepOutputs | None:
        """The detokenizer's next message. Call until None: a large burst takes several messages."""
        return self._outputs.take()

    def take_grammar_messages(self) -> list[tuple[int, list[SchedulerToGrammar]]]:
        """The messages to the grammar processes since the last call, each list with its process's index."""
        return self._grammar_workers.take_messages()

    # State

    @property
    def num_in_flight(self) -> int:
        """Number of steps that are planned and not applied."""
        return len(self._in_flight)

    @property
    def num_open(self) -> int:
        """Number of sequences that have not ended."""
        return len(self._open)

    @property
    def num_withdrawn(self) -> int:
        """Number of withdrawn requests that may still arrive, and are dropped then."""
        return self._admission.num_withdrawn

    @property
    def has_work(self) -> bool:
        """Whether something can be planned, now or when a step in flight has been applied."""
        return bool(self._planner.running or self._admission.queue)

    @property
    def next_timer_ns(self) -> int | None:
        """When `expire` may have something to do, by the scheduler's clock; None: not before the next `add`."""
        timers = (self._open.next_timer_ns, self._grammar_workers.next_timer_ns)
        return min((timer for timer in timers if timer is not None), default=None)

    def gauges(self) -> dict[str, int]:
        """Statistics by their names in `ipc/stats_page.py`. The worker adds the host's times and the rings' records."""
        queue, pool = self._admission.queue, self._kv_cache.pool
        return {
            **self.counts,
            "num_waiting": queue.num_waiting,
            "num_waiting_tokens": queue.num_waiting_tokens,
            "num_running": len(self._planner.running),
            "num_preempted": queue.num_preempted,
            "num_blocks": pool.num_blocks,
            "num_free_blocks": pool.num_free,
            "num_free_rows": self._table.num_free,
            "num_cached_blocks": pool.num_cached,
            **self._step_times.device.gauges(),
        }
