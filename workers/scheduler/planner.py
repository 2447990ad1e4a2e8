"""Chooses who runs in a step, gives them blocks, and writes the step's record.

Owns the running batch, the pool of blocks and who holds them. Decodes come first, then chunks of running prompts,
oldest first, then who comes in from the backlog. When blocks run out, the running sequence with the highest rank is
preempted: it gives up its blocks and computes its tokens again later. Whoever has come in or come back is no victim
before it has got a token from that, and until then its blocks are reserved. So every admission brings at least one
token, and a sequence that lacks a block can always get one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ipc.records import StepRecord, StepShape
from workers.scheduler.admission.backlog import Backlog
from workers.scheduler.admission.prompt_rings import PromptLease, PromptRings
from workers.scheduler.admission.request import Request
from workers.scheduler.array_types import BoolArray, IntArray
from workers.scheduler.blocks import BlockPool, BlockTables
from workers.scheduler.chunk_limit import ChunkLimit
from workers.scheduler.output_buffer import OutputBuffer
from workers.scheduler.prefix_cache import PrefixCache
from workers.scheduler.running_rows import NO_ROWS, RunningRows, share_tokens
from workers.scheduler.sequence_table import SequenceTable


@dataclass(frozen=True)
class Batch:
    """The sequences of a step, in the record's order. Decode after decode they are the same ones."""

    rows: IntArray  # [num_seqs]
    generations: IntArray  # [num_seqs]
    variant: int  # the most that any of them needs
    want_logprobs: int

    @classmethod
    def of(cls, rows: IntArray, columns: SequenceTable) -> Batch:
        want_logprobs = int(columns.want_logprobs[rows].max(initial=0))
        return cls(rows, columns.generation[rows], int(columns.variant[rows].max(initial=0)), want_logprobs)


@dataclass(frozen=True)
class PlannedStep:
    """A step in flight, as it was when it was planned."""

    ticket: int
    batch: Batch
    samples: BoolArray  # [num_seqs]
    num_prompt_tokens: int  # tokens more than one for each sequence
    leases: list[PromptLease]  # prompt records that its admissions are copied from


class Planner:
    """One step after the other, tickets from 1. Counts what it does in `counts`; tells `outputs` of cached tokens."""

    def __init__(
        self,
        shape: StepShape,
        num_blocks: int,
        rows: SequenceTable,
        backlog: Backlog,
        prompts: PromptRings,
        chunk: ChunkLimit,
        outputs: OutputBuffer,
        counts: dict[str, int],
        clock: Callable[[], int],
    ) -> None:
        self.blocks = BlockPool(num_blocks)
        self.running = RunningRows(shape.max_num_seqs)
        self._tables = BlockTables(self.blocks, shape.max_num_seqs, shape.max_blocks_per_seq, shape.block_size)
        self.cache = PrefixCache(self.blocks, self._tables, rows)
        self._shape = shape
        self._rows = rows
        self._backlog = backlog
        self._prompts = prompts
        self._chunk = chunk
        self._outputs = outputs
        self._counts = counts
        self._clock = clock
        self._next_ticket = 1
        self._batch = Batch.of(NO_ROWS, rows)  # the last step's; good for as long as `running` gives the same array

    def plan(self, record: StepRecord) -> PlannedStep | None:
        """Fill a step record with what runs next, to be published. None: nothing can run, and nothing is written."""
        rows, counts, num_tokens, num_appends = self._plan_running(record)
        new_rows, new_counts, leases, num_appends = self._admit(record, num_tokens, num_appends)
        if new_rows.size:
            lengths = self._rows.num_computed[new_rows] + new_counts
            num_appends = self._append_blocks(record, num_appends, *self._tables.missing(new_rows, lengths))
            rows, counts = np.concatenate((rows, new_rows)), np.concatenate((counts, new_counts))
        if not rows.size:
            return None
        record.num_appends[0] = num_appends
        record.num_admissions[0] = new_rows.size
        return self._commit(record, rows, counts, leases)

    def stop(self, rows: list[int]) -> None:
        """Take rows out of the batch; their blocks go to whoever is planned next."""
        self.running.stop(rows)
        self._tables.free_rows(rows)

    def _plan_running(self, record: StepRecord) -> tuple[IntArray, IntArray, int, int]:
        """Tokens for the running rows, and their blocks: rows, tokens of each, tokens left for others, block-table
        entries written."""
        columns, budget = self._rows, self._shape.max_num_batched_tokens
        while True:
            rows = self.running.rows()
            remaining = columns.num_planned_tokens[rows] - columns.num_computed[rows]
            rows, counts, left = share_tokens(rows, remaining, budget, self._chunk.max_tokens(budget))
            missing = self._tables.missing(rows, columns.num_computed[rows] + counts)
            num_wanted = missing[2]
            if num_wanted and remaining.max() > 1:
                num_wanted = self._num_wanted(rows, counts)
            if num_wanted <= self.blocks.num_free:
                return rows, counts, left, self._append_blocks(record, 0, *missing)
            self._preempt()

    def _num_wanted(self, rows: IntArray, counts: IntArray) -> int:
        """How many blocks there must be for these rows to compute so many tokens, and for every running row to go on
        until it has made progress."""
        running = self.running.rows()
        lengths = self._rows.num_computed.copy()
        lengths[rows] += counts
        return self._tables.missing(running, np.maximum(lengths, self._rows.progress_len)[running])[2]

    def _admit(
        self, record: StepRecord, num_tokens: int, num_appends: int
    ) -> tuple[IntArray, IntArray, list[PromptLease], int]:
        """Bring in preempted, then waiting requests with `num_tokens` tokens: rows, tokens of each, prompt records, and
        the end of the block-table entries, where their cached blocks are written behind the first `num_appends`.

        One comes in only if there are blocks for all its tokens and for the growth of those that run while it computes
        them: they should not have to give way to it. (Running prompts have theirs: before they are whole, they leave
        no tokens to admit anybody with.)
        """
        rows: list[int] = []
        counts: list[int] = []
        leases: list[PromptLease] = []
        num_blocks, num_others = self.blocks.num_free, len(self.running)
        num_found = self._shape.max_blocks_per_seq  # cached blocks that fit into the record; at least one request's do
        while num_tokens > 0 and len(rows) < self._shape.max_admissions:
            i, request = len(rows), self._backlog.next(self._rows.num_free)
            if request is None or self._waits_for_leader(request):
                break
            num_known = int(self._rows.num_planned_tokens[request.row]) if request.has_row else request.num_prompt
            found = self.cache.find(request, num_known)
            num_cached = len(found) * self._shape.block_size
            needed = self._tables.blocks_for(num_known) - self.blocks.num_in_use(found)
            num_steps = -(-(num_known - num_cached) // num_tokens)
            growth = num_others * self._tables.blocks_for(num_steps)
            if needed + growth > num_blocks or len(found) > num_found:
                break
            lease = None
            if not request.has_row:
                lease = self._prompts.admit(request.lease, request.token_ids)
                if lease is None:
                    break
                leases.append(lease)
                self._give_row(request, num_cached)
            self._backlog.admit(request)
            self.cache.begin(request, found)
            if len(found):
                num_appends = self._write_appends(record, num_appends, request.row, np.arange(len(found)), found)
            self._rows.num_computed[request.row] = num_cached
            self._rows.progress_len[request.row] = num_known
            self._rows.rank[request.row] = request.rank
            request.write_admission(record.admit, i, num_cached, lease)
            rows.append(request.row)
            counts.append(min(num_tokens, num_known - num_cached))
            num_tokens -= counts[-1]
            if request.has_followers and counts[-1] == num_known - num_cached:  # they may come in behind it at once
                missing = self._tables.missing(np.array([request.row]), np.array([num_known]))
                num_appends = self._append_blocks(record, num_appends, *missing)
                self.cache.offer_prompt(request)
            num_blocks -= needed
            num_others += 1
            num_found -= len(found)
        if not rows:
            return NO_ROWS, NO_ROWS, leases, num_appends
        self.running.start(rows)
        return np.array(rows, np.int64), np.array(counts, np.int64), leases, num_appends

    def _waits_for_leader(self, request: Request) -> bool:
        """Sample 0 is computing the prompt in chunks: its blocks are found once the last of them is planned. Others
        hardly lose by waiting with this one: until then that prompt takes what budget there is.
        """
        leader = request.leader
        if leader is None or not leader.has_row or self._rows.requests[leader.row] is not leader:
            return False
        return not self.cache.has_offered_prompt(leader) and not self._backlog.is_preempted(leader)

    def _give_row(self, request: Request, num_cached: int) -> None:
        """A request comes in for the first time."""
        request.row = self._rows.take(request)
        self.cache.enter(request)
        self._counts["num_admitted"] += 1
        self._counts["num_prompt_tokens"] += request.num_prompt
        if num_cached:
            self._counts["num_cached_tokens"] += num_cached
            self._outputs.cached.append((request.key, num_cached))

    def _append_blocks(self, record: StepRecord, start: int, rows: IntArray, counts: IntArray, total: int) -> int:
        """Give rows the blocks they miss and write that from entry `start` on; returns the end."""
        if total == 0:
            return start
        return self._write_appends(record, start, *self._tables.extend(rows, counts, total))

    def _write_appends(self, record: StepRecord, start: int, row: Any, index: IntArray, block: Any) -> int:
        end = start + len(index)
        assert end <= self._shape.max_appends, f"{end} block-table entries in one step, {self._shape.max_appends} fit"
        record.append_row[start:end] = row
        record.append_index[start:end] = index
        record.append_block[start:end] = block
        return end

    def _commit(self, record: StepRecord, rows: IntArray, counts: IntArray, leases: list[PromptLease]) -> PlannedStep:
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
        if rows is not self._batch.rows:
            self._batch = Batch.of(rows, columns)
        batch = self._batch
        record.num_seqs[0] = n
        num_tokens = int(counts.sum())
        record.num_tokens[0] = num_tokens
        record.variant[0] = batch.variant
        record.want_logprobs[0] = batch.want_logprobs
        record.planned_at_ns[0] = self._clock()
        record.seq_row[:n] = rows
        record.seq_num_tokens[:n] = counts
        record.seq_sample[:n] = samples
        self._backlog.sampled(rows[samples])
        self.cache.offer_full(rows)  # before rows that are planned out give up their blocks
        step = PlannedStep(ticket, batch, samples, num_tokens - n, leases)
        self._counts["num_steps"] += 1
        self._counts["num_prefill_steps"] += step.num_prompt_tokens > 0
        planned_out = planned == columns.max_len[rows]
        if planned_out.any():
            self.stop(rows[planned_out].tolist())  # their last tokens are never computed: they need no block
        return step

    def _preempt(self) -> None:
        """A running sequence gives up its blocks; it waits, row and ids kept, to compute them again.

        It is the one with the highest rank of those that have made progress. There is one: who has not lacks no blocks.
        """
        columns, rows = self._rows, self.running.rows()
        victims = rows[columns.num_computed[rows] >= columns.progress_len[rows]]
        assert victims.size, f"rows {rows} lack blocks that were reserved for them"
        row = int(victims[columns.rank[victims].argmax()])
        self.stop([row])
        columns.num_computed[row] = 0
        request = columns.requests[row]
        assert request is not None, f"row {row} runs for nobody"
        self._backlog.preempt(request)
        self._counts["num_preemptions"] += 1
