"""Decides which sequences run next. Knows no tensors, no sockets and no processes.

A request waits (FIFO) until it gets a row, runs, may be preempted and come back, and ends once:

    add -> waiting -> running <-> preempted
                         |  ^ every step: tokens planned, blocks given
                      planned out (all its tokens are planned; no blocks any more) -> end -> row retired -> row free

Iteration-level continuous batching: each step computes one token of every decoding sequence, then chunks of prompts of
running sequences, oldest first, then admits: preempted sequences first, then waiting ones. Steps are planned up to
`depth` ahead, assuming that no row stops early; what later steps say of a row that did is dropped by its generation.
When blocks run out, the newest running sequence is preempted: it gives up its blocks and computes its tokens again
later. All columns speak of the state after every planned step has run, `num_tokens` alone of what has been applied.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ipc.errors import ConfigError
from ipc.messages import Ended, StepOutputs, Tokenized
from ipc.records import FinishCode, StepShape
from workers.scheduler.arrays import BoolArray, IntArray
from workers.scheduler.blocks import BlockPool, BlockTables
from workers.scheduler.config import SchedulerConfig
from workers.scheduler.device_time import DeviceTime
from workers.scheduler.limits import Limits
from workers.scheduler.outputs import LogprobArrays, OutputBuffer
from workers.scheduler.prefix_cache import PrefixCache
from workers.scheduler.prompts import PromptLease, PromptRings
from workers.scheduler.request import Request, opened
from workers.scheduler.rows import Rows
from workers.scheduler.running import NO_ROWS, RunningRows, share_tokens

_LENGTH: Final = int(FinishCode.LENGTH)


@dataclass(frozen=True)
class PlannedStep:
    """A step in flight, as it was when it was planned. Sequences in the record's order."""

    ticket: int
    rows: IntArray  # [num_seqs]
    generations: IntArray  # [num_seqs]
    samples: BoolArray  # [num_seqs]
    want_logprobs: int
    leases: list[PromptLease]  # prompt records that its admissions are copied from
    work_since_ns: int


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
            ("num_steps", "num_sampled_tokens", "num_prompt_tokens", "num_admitted", "num_finished", "num_cancelled",
             "num_refused", "num_preemptions", "num_cached_tokens"), 0,
        )  # fmt: skip
        self._limits = Limits(shape.max_model_len, shape.block_size, num_blocks, config.max_num_waiting)
        self._shape = shape
        self._eos_token_ids = eos_token_ids
        self._clock = clock
        self._rows = Rows(shape.max_num_seqs, shape.max_model_len)
        self._blocks = BlockPool(num_blocks)
        self._tables = BlockTables(self._blocks, shape.max_num_seqs, shape.max_blocks_per_seq, shape.block_size)
        self._cache = PrefixCache(self._blocks, self._tables, self._rows)
        self._requests: dict[int, Request] = {}  # every open one by key
        self._waiting: OrderedDict[int, Request] = OrderedDict()  # by key, oldest first
        self._preempted: OrderedDict[int, Request] = OrderedDict()  # the same; all older than those waiting
        self._running = RunningRows(shape.max_num_seqs)
        self._in_flight: deque[PlannedStep] = deque()
        self._next_ticket = 1
        self._outputs = OutputBuffer()
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
    def has_work(self) -> bool:
        """Something can be planned, now or when a step in flight has been applied."""
        return bool(self._running or self._preempted or self._waiting)

    def gauges(self) -> dict[str, int]:
        """The scheduler's statistics by their names in `ipc/stats.py`, durations of the host excepted."""
        return {
            **self.counts,
            "num_waiting": len(self._waiting),
            "num_running": len(self._running),
            "num_preempted": len(self._preempted),
            "num_blocks": self._blocks.num_blocks,
            "num_free_blocks": self._blocks.num_free,
            "num_cached_blocks": self._blocks.num_cached,
            "device_busy_ns": self.device_time.busy_ns,
            "device_wait_ns": self.device_time.wait_ns,
            "device_no_work_ns": self.device_time.no_work_ns,
            "device_last_end_ns": self.device_time.last_end_ns,
        }

    def take_outputs(self) -> StepOutputs | None:
        """What the detokenizer must hear since the last call. Call until None: a huge burst takes several messages."""
        return self._outputs.take()

    # Arrivals and cancellations

    def add(self, message: Tokenized) -> None:
        """Take in a request; one that cannot be served is opened and ended at once."""
        assert message.key not in self._requests, f"key {message.key} was drawn twice"
        self._outputs.opened.append(opened(message))
        refusal = self._limits.refusal(message, len(self._waiting), self._rows.num_free)
        if refusal is not None:
            if message.ticket:  # its ids lie in the ring all the same
                self.prompts.decline(message.ring, message.ticket, message.num_prompt_tokens)
            self.counts["num_refused"] += 1
            self._outputs.ended.append(refusal)
            return
        if not self.has_work:
            self._work_since_ns = self._clock()
        ids, lease = self.prompts.receive(message.ring, message.ticket, message.num_prompt_tokens)
        request = Request(message, self._limits.max_len(message), ids, lease, self._eos_token_ids)
        self._requests[request.key] = self._waiting[request.key] = request
        if self.num_in_flight >= self.depth:  # it waits for a step to end, at least
            self.prompts.relieve()

    def cancel(self, keys: list[int]) -> None:
        """End requests now. What steps in flight sample for them is dropped; keys that have ended are ignored."""
        found = [self._requests[key] for key in dict.fromkeys(keys) if key in self._requests]
        self._end(found)
        self.counts["num_cancelled"] += len(found)
        self._outputs.ended += [Ended(key=request.key, finish_reason="cancelled") for request in found]

    def clear_cache(self) -> None:
        """Requests that are admitted from now on find no block that was filled before."""
        self._cache.clear()

    # Planning

    def plan(self, record: Any) -> bool:
        """Fill a step record with what runs next; the caller publishes it. False: nothing can run, nothing is written.

        Only with credit: at most `depth` steps are in flight.
        """
        assert self.num_in_flight < self.depth, f"{self.num_in_flight} steps are in flight already"
        rows, counts, num_appends = self._plan_running(record)
        num_tokens = self._shape.max_num_batched_tokens - int(counts.sum())
        new_rows, new_counts, leases, num_appends = self._admit(record, num_tokens, num_appends)
        if new_rows.size:
            lengths = self._rows.num_computed[new_rows] + new_counts
            num_appends = self._append_blocks(record, num_appends, *self._tables.missing(new_rows, lengths))
            rows, counts = np.concatenate((rows, new_rows)), np.concatenate((counts, new_counts))
        if not rows.size:
            self.prompts.relieve()
            return False
        self._commit(record, rows, counts, leases)
        record.num_appends[0] = num_appends
        record.num_admissions[0] = new_rows.size
        self.prompts.relieve()  # who still waits does so for a step
        return True

    def _plan_running(self, record: Any) -> tuple[IntArray, IntArray, int]:
        """Tokens for the running rows, and their blocks: rows, tokens of each, block-table entries written."""
        columns = self._rows
        while True:
            rows = self._running.rows()
            remaining = columns.num_planned_tokens[rows] - columns.num_computed[rows]
            rows, counts = share_tokens(rows, remaining, self._shape.max_num_batched_tokens)
            missing = self._tables.missing(rows, columns.num_computed[rows] + counts)
            if missing[2] <= self._blocks.num_free:
                return rows, counts, self._append_blocks(record, 0, *missing)
            self._preempt_newest()  # until it fits: the oldest alone always does

    def _admit(
        self, record: Any, num_tokens: int, num_appends: int
    ) -> tuple[IntArray, IntArray, list[PromptLease], int]:
        """Bring in preempted, then waiting requests with `num_tokens` tokens: rows, tokens of each, prompt records, and
        the end of the block-table entries, where their cached blocks are written behind the first `num_appends`.

        One comes in only if there are blocks for all its tokens and one more for each sequence that runs: it should
        have computed something before the others' growth preempts it. (Running prompts have theirs: before they are
        whole, they leave no budget to admit anybody with.)
        """
        rows: list[int] = []
        counts: list[int] = []
        leases: list[PromptLease] = []
        if num_tokens < 1 or not (self._preempted or (self._waiting and self._rows.num_free)):
            return NO_ROWS, NO_ROWS, leases, num_appends
        num_blocks = self._blocks.num_free - len(self._running)
        num_found = self._shape.max_blocks_per_seq  # cached blocks that fit into the record; at least one request's do
        while num_tokens > 0 and len(rows) < self._shape.max_admissions:
            i, request = len(rows), self._next_request()
            if request is None:
                break
            num_known = int(self._rows.num_planned_tokens[request.row]) if request.has_row else request.num_prompt
            found = self._cache.find(request, num_known)
            needed = self._tables.blocks_for(num_known) - self._blocks.num_in_use(found)
            if needed > num_blocks or len(found) > num_found:
                break
            if request.has_row:
                del self._preempted[request.key]
                record.admit_ring[i] = record.admit_ticket[i] = record.admit_length[i] = 0  # the row keeps its ids
            else:
                lease = self.prompts.admit(request.lease, request.token_ids)
                if lease is None:
                    break
                del self._waiting[request.key]
                leases.append(lease)
                request.row = self._rows.take(request)
                self._cache.enter(request)
                record.admit_ring[i] = lease.ring
                record.admit_ticket[i] = lease.ticket
                record.admit_length[i] = request.num_prompt
                self.counts["num_admitted"] += 1
                self.counts["num_prompt_tokens"] += request.num_prompt
                if len(found):
                    num_cached = len(found) * self._shape.block_size
                    self.counts["num_cached_tokens"] += num_cached
                    self._outputs.cached.append((request.key, num_cached))
            num_cached = self._cache.begin(request, found)
            if len(found):
                num_appends = self._write_appends(record, num_appends, request.row, np.arange(len(found)), found)
            self._rows.num_computed[request.row] = num_cached
            request.write_admission(record, i, num_cached)
            rows.append(request.row)
            counts.append(min(num_tokens, num_known - num_cached))
            num_tokens -= counts[-1]
            num_blocks -= needed + 1
            num_found -= len(found)
        self._running.start(rows)
        return np.array(rows, np.int64), np.array(counts, np.int64), leases, num_appends

    def _next_request(self) -> Request | None:
        """Who comes in next. Preempted ones are older than all that wait."""
        if self._preempted:
            return next(iter(self._preempted.values()))
        if self._waiting and self._rows.num_free:
            return next(iter(self._waiting.values()))
        return None

    def _append_blocks(self, record: Any, start: int, rows: IntArray, counts: IntArray, total: int) -> int:
        """Give rows the blocks they miss and write that from entry `start` on; returns the end."""
        if total == 0:
            return start
        return self._write_appends(record, start, *self._tables.extend(rows, counts, total))

    def _write_appends(self, record: Any, start: int, row: Any, index: IntArray, block: Any) -> int:
        end = start + len(index)
        assert end <= self._shape.max_appends, f"{end} block-table entries in one step, {self._shape.max_appends} fit"
        record.append_row[start:end] = row
        record.append_index[start:end] = index
        record.append_block[start:end] = block
        return end

    def _commit(self, record: Any, rows: IntArray, counts: IntArray, leases: list[PromptLease]) -> None:
        """Write the sequences, and take the step as run."""
        columns, n = self._rows, len(rows)
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        computed = columns.num_computed[rows] + counts
        planned = columns.num_planned_tokens[rows]
        samples = computed == planned
        planned += samples
        columns.num_computed[rows] = computed
        columns.num_planned_tokens[rows] = planned
        columns.last_ticket[rows] = ticket
        want_logprobs = int(columns.want_logprobs[rows].max())
        record.num_seqs[0] = n
        record.num_tokens[0] = counts.sum()
        record.variant[0] = columns.variant[rows].max()
        record.want_logprobs[0] = want_logprobs
        record.planned_at_ns[0] = self._clock()
        record.seq_row[:n] = rows
        record.seq_num_tokens[:n] = counts
        record.seq_sample[:n] = samples
        self._cache.offer_full(rows)  # before rows that are planned out give up their blocks
        self._in_flight.append(
            PlannedStep(ticket, rows, columns.generation[rows], samples, want_logprobs, leases, self._work_since_ns)
        )
        self.counts["num_steps"] += 1
        planned_out = planned == columns.max_len[rows]
        if planned_out.any():
            self._stop_running(rows[planned_out].tolist())  # their last tokens are never computed: they need no block

    def _stop_running(self, rows: list[int]) -> None:
        """Take rows out of the batch; their blocks go to whoever is planned next."""
        self._running.stop(rows)
        self._tables.free_rows(rows)

    def _preempt_newest(self) -> None:
        """The newest running sequence gives up its blocks; it waits, row and ids kept, to compute them again."""
        row = int(self._running.rows()[-1])
        assert len(self._running) > 1, f"row {row} runs alone and lacks blocks"
        self._stop_running([row])
        self._rows.num_computed[row] = 0
        request = self._rows.requests[row]
        assert request is not None, f"row {row} runs for nobody"
        self._preempted[request.key] = request
        self._preempted.move_to_end(request.key, last=False)  # it is older than those preempted before it
        self.counts["num_preemptions"] += 1

    # Results

    def apply(self, result: Any) -> None:
        """Take in the result record of the oldest step in flight; nothing of it is kept by reference."""
        step = self._in_flight.popleft()
        columns, n = self._rows, len(step.rows)
        valid = (columns.generation[step.rows] == step.generations) & step.samples
        rows, token_ids, finish = step.rows, result.token_ids[:n], result.finish[:n]
        if not valid.all():
            rows, token_ids, finish = rows[valid], token_ids[valid], finish[valid]
        if rows.size:
            num_tokens = columns.num_tokens[rows]
            columns.token_ids[rows, num_tokens] = token_ids
            columns.num_tokens[rows] = num_tokens + 1
            logprobs = _copy_logprobs(result, n, valid, step.want_logprobs) if step.want_logprobs else None
            self._outputs.add_tokens(columns.key[rows], token_ids, finish, logprobs)
            self.counts["num_sampled_tokens"] += rows.size
            if finish.any():
                self._finish(rows, finish)
        columns.step_applied(step.ticket)
        for lease in step.leases:
            self.prompts.release(lease)
        self.device_time.add_step(int(result.device_start_ns[0]), int(result.device_end_ns[0]), step.work_since_ns)

    def _finish(self, rows: IntArray, finish: IntArray) -> None:
        """End the rows whose token was their last."""
        ended = finish.nonzero()[0]
        rows, finish = rows[ended], finish[ended]
        early = (finish == _LENGTH) & (self._rows.num_tokens[rows] < self._rows.max_len[rows])
        assert not early.any(), f"rows {rows[early]} ended by length before their length"
        requests = [self._rows.requests[row] for row in rows.tolist()]
        self._end([request for request in requests if request is not None])
        self.counts["num_finished"] += len(rows)

    def _end(self, requests: list[Request]) -> None:
        """Forget requests in whatever state: blocks go back at once, rows when no step in flight names them."""
        running = []
        for request in requests:
            del self._requests[request.key]
            if not request.has_row:
                del self._waiting[request.key]
                self.prompts.release(request.lease)
                continue
            if self._preempted.pop(request.key, None) is None and request.row in self._running:
                running.append(request.row)
            self._rows.retire(request.row)
        if running:
            self._stop_running(running)


def _copy_logprobs(result: Any, n: int, valid: IntArray, want_logprobs: int) -> LogprobArrays:
    num_top = want_logprobs - 1
    return LogprobArrays(
        result.logprob[:n][valid], result.top_ids[:n, :num_top][valid], result.top_logprobs[:n, :num_top][valid]
    )
