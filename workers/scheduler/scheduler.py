"""Decides which sequences run next. Knows no tensors, no sockets and no processes.

A request waits until the policy (`policies.py`) gives it a row, runs, may be preempted and come back, and ends once:

    add -> waiting -> running <-> preempted
                         |  ^ every step: tokens planned, blocks given
                      planned out (all its tokens are planned; no blocks any more) -> end -> row retired -> row free

Iteration-level continuous batching: each step computes one token of every decoding sequence and, with the tokens that
are left, parts of prompts (`planner.py`). Steps are planned up to `depth` ahead, assuming that no row stops early; what
later steps say of a row that did is dropped by its generation. All columns speak of the state after every planned step
has run, `num_tokens` alone of what has been applied.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final

from ipc.errors import ConfigError, LogitsNotFinite
from ipc.messages import Ended, FinishReason, StepOutputs, Tokenized
from ipc.records import FinishCode, ResultRecord, StepRecord, StepShape
from workers.queueing.policies import make_policy
from workers.queueing.timers import Timers
from workers.scheduler.admission.backlog import Backlog
from workers.scheduler.admission.limits import AdmissionLimits
from workers.scheduler.admission.prompt_rings import PromptRings
from workers.scheduler.admission.request import Request, opened, requests_of
from workers.scheduler.array_types import IntArray
from workers.scheduler.chunk_limit import ChunkLimit
from workers.scheduler.config import SchedulerConfig
from workers.scheduler.device_time import DeviceTime
from workers.scheduler.output_buffer import LogprobArrays, OutputBuffer
from workers.scheduler.planner import PlannedStep, Planner
from workers.scheduler.sequence_table import SequenceTable

_LENGTH: Final = int(FinishCode.LENGTH)
_NOT_FINITE: Final = int(FinishCode.NOT_FINITE)


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
    ) -> None:
        if prompts.max_upload_tokens < shape.max_model_len:
            raise ConfigError(
                f"the upload ring holds {prompts.max_upload_tokens} tokens, less than scheduler.max_model_len "
                f"({shape.max_model_len}): a prompt could not be sent again; give the prompt rings more records"
            )
        self.depth = depth
        self.prompts = prompts
        self.device_time = DeviceTime()
        self.counts = dict.fromkeys(
            ("num_steps", "num_prefill_steps", "num_sampled_tokens", "num_prompt_tokens", "num_admitted",
             "num_finished", "num_cancelled", "num_refused", "num_queue_full", "num_deadline", "num_queue_timeout",
             "num_not_finite", "num_preemptions", "num_cached_tokens"), 0,
        )  # fmt: skip
        self._limits = AdmissionLimits(
            shape.max_model_len, shape.block_size, num_blocks, config.max_num_waiting, shape.max_num_seqs,
        )  # fmt: skip
        self._queue_timeout_s = config.queue_timeout_s
        self._eos_token_ids = eos_token_ids
        self._clock = clock
        self._rows = SequenceTable(shape.max_num_seqs, shape.max_blocks_per_seq, shape.block_size)
        self._requests: dict[int, Request] = {}  # every open one by key
        self._withdrawn: set[int] = set()  # withdrawn before they arrived: dropped when they arrive
        self._timers = Timers(self._requests.__contains__)
        self._backlog = Backlog(config, make_policy(config, shape.max_num_seqs), clock)
        self._chunk = ChunkLimit(None if config.max_itl_ms is None else config.max_itl_ms / 1e3)
        self._outputs = OutputBuffer()
        self._planner = Planner(
            shape, num_blocks, self._rows, self._backlog, prompts, self._chunk, self._outputs, self.counts, clock
        )
        self._in_flight: deque[tuple[PlannedStep, int]] = deque()  # and since when there was work before each
        self._work_since_ns = 0  # when there was last nothing to plan before

    @property
    def num_in_flight(self) -> int:
        """Steps that are planned and not applied."""
        return len(self._in_flight)

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    @property
    def num_withdrawn(self) -> int:
        """Number of withdrawn requests that may still arrive, and are dropped then."""
        return len(self._withdrawn)

    @property
    def has_work(self) -> bool:
        """Something can be planned, now or when a step in flight has been applied."""
        return bool(self._planner.running or self._backlog)

    def gauges(self) -> dict[str, int]:
        """The scheduler's statistics by their names in `ipc/stats_page.py`, durations of the host and records of rings
        excepted."""
        backlog, blocks, device_time = self._backlog, self._planner.blocks, self.device_time
        return {
            **self.counts,
            "num_waiting": backlog.num_waiting,
            "num_waiting_tokens": backlog.num_waiting_tokens,
            "num_running": len(self._planner.running),
            "num_preempted": backlog.num_preempted,
            "num_blocks": blocks.num_blocks,
            "num_free_blocks": blocks.num_free,
            "num_free_rows": self._rows.num_free,
            "num_cached_blocks": blocks.num_cached,
            "device_busy_ns": device_time.busy_ns,
            "device_no_work_ns": device_time.no_work_ns,
            "device_scheduler_ns": device_time.scheduler_ns,
            "device_copies_ns": device_time.copies_ns,
            "device_last_end_ns": device_time.last_end_ns,
        }

    def take_outputs(self) -> StepOutputs | None:
        """What the detokenizer must hear since the last call. Call until None: a huge burst takes several messages."""
        return self._outputs.take()

    # Arrivals, cancellations and time-outs

    def add(self, message: Tokenized) -> bool:
        """Queue a request with all its samples. A request that cannot be served is opened and ended at once.

        Returns False if the gateway withdrew it: then the scheduler drops it and tells no process.
        """
        assert message.key not in self._requests, f"key {message.key} was drawn twice"
        if message.key in self._withdrawn:
            self._withdrawn.discard(message.key)
            self._decline_prompt(message)
            return False
        refusal = self._limits.refusal(message)
        if refusal is None:
            refusal = self._backlog.refusal(message, self._rows.num_free)
            self.counts["num_queue_full"] += refusal is not None
        if refusal is not None:
            self._outputs.opened.append(opened(message, 1))
            self._decline_prompt(message)
            self.counts["num_refused"] += 1
            self._outputs.ended.append(refusal)
            return True
        if not self.has_work:
            self._work_since_ns = self._clock()
        ids, lease = self.prompts.receive(message.ring, message.ticket, message.num_prompt_tokens)
        self._outputs.opened.append(opened(message, message.params.n, ids))
        max_len = self._limits.max_len(message)
        for request in requests_of(message, max_len, ids, lease, self._eos_token_ids):
            self._requests[request.key] = request
            self._backlog.add(request)
            self._set_timers(request.key, message)
        if self.num_in_flight >= self.depth:  # it waits for a step to end, at least
            self.prompts.relieve()
        return True

    def _decline_prompt(self, message: Tokenized) -> None:
        """Release a request's token ids in the prompt ring: they are there although the request is not queued."""
        if message.ticket:
            self.prompts.decline(message.ring, message.ticket, message.num_prompt_tokens)

    def withdraw(self, keys: list[int]) -> list[int]:
        """Of these requests, drop on arrival those that are not open now, without telling the detokenizer.

        Returns their keys. These include requests that arrived and ended earlier: a `cancel` of those must follow.
        """
        withdrawn = [key for key in keys if key not in self._requests]
        self._withdrawn.update(withdrawn)
        return withdrawn

    def cancel(self, keys: list[int]) -> None:
        """End requests now. What steps in flight sample for them is dropped; keys that have ended are ignored."""
        self._withdrawn.difference_update(keys)
        self.counts["num_cancelled"] += self._end_early(keys, "cancelled")

    @property
    def next_timer_ns(self) -> int | None:
        """When `expire` may have something to do, by the scheduler's clock; None: not before the next `add`."""
        return self._timers.first_ns

    def expire(self) -> None:
        """End the requests whose time has run out, with what they have got."""
        if self._timers.first_ns is None:
            return
        for key, reason in self._timers.take_due(self._clock()):
            request = self._requests.get(key)
            if request is not None and not (reason == "queue_timeout" and request.has_row):
                self.counts[f"num_{reason}"] += self._end_early([key], reason)

    def _set_timers(self, key: int, message: Tokenized) -> None:
        """Set the request's timers. Both count from its arrival at the gateway."""
        if message.deadline_ns:
            self._timers.add(message.deadline_ns, key, "deadline")
        wait_s = message.scheduling.queue_timeout_s or self._queue_timeout_s
        if wait_s is not None:
            self._timers.add(message.arrived_ns + round(wait_s * 1e9), key, "queue_timeout")

    def _end_early(self, keys: list[int], reason: FinishReason) -> int:
        """End those of the requests that are open; returns how many were."""
        found = [self._requests[key] for key in dict.fromkeys(keys) if key in self._requests]
        self._end(found)
        self._outputs.ended += [Ended(key=request.key, finish_reason=reason) for request in found]
        return len(found)

    def clear_cache(self) -> None:
        """Requests that are admitted from now on find no block that was filled before."""
        self._planner.cache.clear()

    # Steps

    def plan(self, record: StepRecord) -> bool:
        """Fill a step record with what runs next; the caller publishes it. False: nothing can run, nothing is written.

        Only with credit: at most `depth` steps are in flight.
        """
        assert self.num_in_flight < self.depth, f"{self.num_in_flight} steps are in flight already"
        step = self._planner.plan(record)
        self.prompts.relieve()  # who still waits does so for a step
        if step is None:
            return False
        self._in_flight.append((step, self._work_since_ns))
        return True

    def apply(self, result: ResultRecord) -> None:
        """Take in the result record of the oldest step in flight; nothing of it is kept by reference."""
        step, work_since_ns = self._in_flight.popleft()
        columns, batch = self._rows, step.batch
        rows, n = batch.rows, len(batch.rows)
        valid = (columns.generation[rows] == batch.generations) & step.samples
        token_ids, finish = result.token_ids[:n], result.finish[:n]
        ends = bool(finish.any())
        if ends:
            is_failed = valid & (finish == _NOT_FINITE)
            if is_failed.any():
                self._fail(rows[is_failed])
                valid &= ~is_failed
        if not valid.all():
            rows, token_ids, finish = rows[valid], token_ids[valid], finish[valid]
        if rows.size:
            num_tokens = columns.num_tokens[rows]
            columns.token_ids[rows, num_tokens] = token_ids
            columns.num_tokens[rows] = num_tokens + 1
            logprobs = _copy_logprobs(result, n, valid, batch.want_logprobs) if batch.want_logprobs else None
            self._outputs.add_tokens(columns.key[rows], token_ids, finish, logprobs)
            self.counts["num_sampled_tokens"] += rows.size
            if ends and finish.any():  # those of others have been left out
                self._finish(rows, finish)
        columns.step_applied(step.ticket)
        for lease in step.leases:
            self.prompts.release(lease)
        start_ns, end_ns = int(result.device_start_ns[0]), int(result.device_end_ns[0])
        self.device_time.add_step(start_ns, end_ns, work_since_ns, int(result.received_at_ns[0]))
        self._chunk.add_step(step.num_prompt_tokens, (end_ns - start_ns) / 1e9)

    def _finish(self, rows: IntArray, finish: IntArray) -> None:
        """End the rows whose token was their last."""
        ended = finish.nonzero()[0]
        rows, finish = rows[ended], finish[ended]
        early = (finish == _LENGTH) & (self._rows.num_tokens[rows] < self._rows.max_len[rows])
        assert not early.any(), f"rows {rows[early]} ended by length before their length"
        requests = [self._rows.requests[row] for row in rows.tolist()]
        self._end([request for request in requests if request is not None])
        self.counts["num_finished"] += len(rows)

    def _fail(self, rows: IntArray) -> None:
        """End the rows whose logits are not finite with an error, and withdraw their blocks from the prefix cache.

        Another request that already shares one of these blocks computes with the same tokens, so it ends likewise.
        """
        requests = [request for row in rows.tolist() if (request := self._rows.requests[row]) is not None]
        for request in requests:
            self._planner.cache.withdraw(request)
            text = (
                f"the logits after token {self._rows.num_tokens[request.row]} of this request are not finite: the "
                'model computed NaN or infinity, as float16 does when activations overflow; model.dtype "bfloat16" or '
                '"float32" avoids that'
            )
            self._outputs.ended.append(
                Ended(key=request.key, finish_reason="error", error_code=LogitsNotFinite.code, error_message=text)
            )
        self._end(requests)
        self.counts["num_not_finite"] += len(requests)

    def _end(self, requests: list[Request]) -> None:
        """Forget requests in whatever state: blocks go back at once, rows when no step in flight names them."""
        running, planner = [], self._planner
        for request in requests:
            del self._requests[request.key]
            self._backlog.end(request)
            if not request.has_row:
                self.prompts.release(request.lease)
                continue
            if request.row in planner.running:
                running.append(request.row)
            self._rows.retire(request.row)
        if running:
            planner.stop(running)


def _copy_logprobs(result: ResultRecord, n: int, valid: IntArray, want_logprobs: int) -> LogprobArrays:
    num_top = want_logprobs - 1
    return LogprobArrays(
        result.logprob[:n][valid], result.top_ids[:n, :num_top][valid], result.top_logprobs[:n, :num_top][valid]
    )
