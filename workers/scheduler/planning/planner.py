"""Chooses the sequences of the next step, gives them blocks, and writes the step's record.

Owns which rows run. A step's tokens go, in this order, to

1. decodes: one token for each running sequence whose known tokens are all computed but the last;
2. running prompts, oldest first, cut into chunks; those with log-probabilities get a limited share
   (`prompt_logprobs.py`);
3. preempted sequences, which are resumed, and waiting ones, which are admitted (`Admission.next`).

Three rules about blocks exclude deadlocks:

- Admission. A sequence is admitted or resumed only if there are free blocks for all its known tokens, and for the
  growth of the sequences that run while it computes them.
- Reservation. From then on its blocks are reserved until it has produced a token (`preemptible_len`): other sequences
  cannot take them, and it cannot be preempted. So every admission and every resumption yields at least one token.
- Preemption. When blocks run out, the running sequence with the highest rank among the preemptible ones is preempted.
  It frees its blocks, keeps its row and ids, and computes its tokens again later.

Reserved blocks cannot run out, so only a preemptible sequence can lack a block. Therefore a sequence to preempt always
exists, and every running sequence goes on in the end.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ipc.records import StepRecord, StepShape
from workers.scheduler.admission.admission import Admission
from workers.scheduler.array_types import Int32Array, IntArray
from workers.scheduler.kv_cache.kv_cache import KVCache
from workers.scheduler.planning.chunk_limit import ChunkLimit
from workers.scheduler.planning.mask_requests import MaskRequests
from workers.scheduler.planning.prompt_logprobs import PromptChunk, PromptPositions
from workers.scheduler.planning.running_rows import NO_ROWS, RunningRows
from workers.scheduler.planning.step import Batch, PlannedStep, StepWriter
from workers.scheduler.planning.token_budget import share_tokens
from workers.scheduler.sequence import Sequence
from workers.scheduler.sequence_table import SequenceTable


class Planner:
    """Plans one step after the other, with tickets from 1. Counts what it does in `counts`."""

    def __init__(
        self,
        shape: StepShape,
        table: SequenceTable,
        kv_cache: KVCache,
        admission: Admission,
        mask_requests: MaskRequests,
        chunk_limit: ChunkLimit,
        counts: dict[str, int],
        clock: Callable[[], int],
    ) -> None:
        self.running = RunningRows(shape.max_num_seqs)
        self._shape = shape
        self._table = table
        self._pool = kv_cache.pool
        self._tables = kv_cache.tables
        self._prefixes = kv_cache.prefixes
        self._admission = admission
        self._mask_requests = mask_requests
        self._chunk_limit = chunk_limit
        self._prompt_positions = PromptPositions(shape, table)
        self._counts = counts
        self._clock = clock
        self._next_ticket = 1
        self._batch = Batch.of(NO_ROWS, table)  # of the last step; valid while `running` returns the same array

    def plan(self, record: StepRecord) -> PlannedStep | None:
        """Fill a step record for the caller to publish. None: nothing can run, and the record is unchanged."""
        plan_ns = self._clock()
        writer = StepWriter(record, self._shape)
        rows, counts, budget = self._schedule_running(writer)
        new_rows, new_counts = self._schedule_admissions(writer, budget, self._num_prompt_positions_left(rows, counts))
        if new_rows.size:
            rows, counts = np.concatenate((rows, new_rows)), np.concatenate((counts, new_counts))
        return self._finish_step(writer, rows, counts, plan_ns) if rows.size else None

    def stop(self, rows: list[int]) -> None:
        """Let running rows run no more, and free their blocks."""
        self.running.stop(rows)
        self._tables.free_rows(rows)

    def replace_device(self) -> None:
        """No row runs, and steps are numbered from 1 again."""
        self.running.stop_all()
        self._next_ticket = 1
        self._batch = Batch.of(NO_ROWS, self._table)

    # Running sequences

    def _schedule_running(self, writer: StepWriter) -> tuple[IntArray, IntArray, int]:
        """Give running rows their tokens and blocks. Preempts sequences until the blocks suffice.

        Returns the rows that compute something, the tokens of each, and the tokens left for admissions.
        """
        table, budget = self._table, self._shape.max_num_batched_tokens
        while True:
            rows = self.running.rows()
            remaining = table.num_planned_tokens[rows] - table.num_computed_tokens[rows]
            most = self._prompt_positions.most_tokens(rows, remaining) if table.num_wanting_prompt_logprobs else None
            rows, counts, left = share_tokens(rows, remaining, budget, self._chunk_limit.max_tokens(budget), most)
            missing = self._tables.missing(rows, table.num_computed_tokens[rows] + counts)
            num_wanted = missing[2]
            if num_wanted and remaining.max() > 1:
                num_wanted = self._num_blocks_reserved(rows, counts)
            if num_wanted <= self._pool.num_free:
                self._append_blocks(writer, missing)
                return rows, counts, left
            self._preempt()

    def _num_blocks_reserved(self, rows: IntArray, counts: IntArray) -> int:
        """Number of further blocks that this step needs, and that running rows need to reach `preemptible_len`."""
        running = self.running.rows()
        lengths = self._table.num_computed_tokens.copy()
        lengths[rows] += counts
        return self._tables.missing(running, np.maximum(lengths, self._table.preemptible_len)[running])[2]

    def _preempt(self) -> None:
        """Preempt the running sequence with the highest rank among the preemptible ones."""
        table, rows = self._table, self.running.rows()
        preemptible = rows[table.num_computed_tokens[rows] >= table.preemptible_len[rows]]
        assert preemptible.size, f"rows {rows} lack blocks that were reserved for them"
        row = int(preemptible[table.rank[preemptible].argmax()])
        self.stop([row])
        table.num_computed_tokens[row] = 0
        sequence = table.sequences[row]
        assert sequence is not None, f"row {row} runs without a sequence"
        self._admission.preempt(sequence)

    # Admitted and resumed sequences

    def _num_prompt_positions_left(self, rows: IntArray, counts: IntArray) -> int:
        """How many tokens of prompts with log-probabilities can join a step that computes `counts` tokens of `rows`."""
        positions = self._prompt_positions
        if not self._table.num_wanting_prompt_logprobs:
            return positions.max_tokens
        return positions.max_tokens - positions.num_tokens(rows, counts)

    def _schedule_admissions(self, writer: StepWriter, budget: int, num_positions: int) -> tuple[IntArray, IntArray]:
        """Resume and admit sequences with `budget` tokens, of which `num_positions` may belong to prompts with
        log-probabilities. Returns their rows, and the tokens of each in this step."""
        if budget <= 0:
            return NO_ROWS, NO_ROWS
        rows: list[int] = []
        counts: list[int] = []
        num_free, num_others = self._pool.num_free, len(self.running)
        if self._table.num_wanting_prompt_logprobs:  # their prompts may leave tokens before they are whole
            num_free -= self._num_blocks_reserved(NO_ROWS, NO_ROWS)
        num_entries = self._shape.max_blocks_per_seq  # cached blocks that still fit into the record
        while budget > 0 and len(rows) < self._shape.max_admissions:
            sequence = self._admission.next()
            if sequence is None or self._must_wait_for_leader(sequence):
                break
            is_limited = self._table.wants_prompt_logprobs(sequence)
            most = min(budget, num_positions) if is_limited else budget
            if not most:
                break
            num_known = self._num_known(sequence)
            found = self._prefixes.find(sequence, num_known)
            num_left = num_known - len(found) * self._shape.block_size  # tokens that are not cached
            num_needed = self._tables.blocks_for(num_known) - self._pool.num_in_use(found)
            # Other running prompts need no blocks here: until they are computed, they leave no tokens for admissions.
            growth = num_others * self._tables.blocks_for(-(-num_left // most))
            if num_needed + growth > num_free or len(found) > num_entries:
                break
            if not self._start(writer, sequence, num_known, found):
                break
            rows.append(sequence.row)
            counts.append(min(most, num_left))
            budget -= counts[-1]
            num_positions -= counts[-1] if is_limited else 0
            if sequence.has_followers and counts[-1] == num_left:  # its other samples may join this step
                self._append_blocks(writer, self._tables.missing(np.array([sequence.row]), np.array([num_known])))
                self._prefixes.offer_prompt(sequence)
            num_free -= num_needed
            num_others += 1
            num_entries -= len(found)
        return self._start_running(writer, rows, counts) if rows else (NO_ROWS, NO_ROWS)

    def _start(self, writer: StepWriter, sequence: Sequence, num_known: int, found: Int32Array) -> bool:
        """Admit or resume a sequence with its cached blocks. False: it cannot be admitted before a step is applied."""
        num_cached, is_new = len(found) * self._shape.block_size, not sequence.has_row
        leases = self._admission.admit(sequence, num_cached) if is_new else self._admission.resume(sequence)
        if leases is None:
            return False
        if is_new:
            self._prefixes.set_prompt_hashes(sequence)
        table, row = self._table, sequence.row
        self._prefixes.begin(sequence, found)
        if len(found):
            writer.append_blocks(row, np.arange(len(found)), found)
        table.num_computed_tokens[row] = num_cached
        table.preemptible_len[row] = num_known
        table.rank[row] = sequence.rank
        writer.add_admission(sequence, num_cached, *leases)
        return True

    def _start_running(self, writer: StepWriter, rows: list[int], counts: list[int]) -> tuple[IntArray, IntArray]:
        """Let admitted and resumed rows run, with blocks for this step's tokens."""
        self.running.start(rows)
        new_rows, new_counts = np.array(rows, np.int64), np.array(counts, np.int64)
        lengths = self._table.num_computed_tokens[new_rows] + new_counts
        self._append_blocks(writer, self._tables.missing(new_rows, lengths))
        return new_rows, new_counts

    def _num_known(self, sequence: Sequence) -> int:
        """Number of tokens that a sequence has to compute before it samples the next one."""
        return int(self._table.num_planned_tokens[sequence.row]) if sequence.has_row else sequence.num_known

    def _must_wait_for_leader(self, sequence: Sequence) -> bool:
        """Whether sample 0 of the same prompt is still computing it in chunks.

        The sequence finds sample 0's blocks once the last chunk is planned. Sequences behind it in the queue lose
        little: until then the prompt of sample 0 uses the tokens that are left.
        """
        leader = sequence.leader
        if leader is None or not leader.has_row or self._table.sequences[leader.row] is not leader:
            return False
        return not self._prefixes.has_offered_prompt(leader) and not self._admission.queue.is_preempted(leader)

    # The step

    def _append_blocks(self, writer: StepWriter, missing: tuple[IntArray, IntArray, int]) -> None:
        """Give rows the blocks that they lack, as `BlockTables.missing` returned them."""
        rows, counts, total = missing
        if total:
            writer.append_blocks(*self._tables.extend(rows, counts, total))

    def _finish_step(self, writer: StepWriter, rows: IntArray, counts: IntArray, plan_ns: int) -> PlannedStep:
        """Write the sequences, and advance the planned columns to the state after this step."""
        table = self._table
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        prompt_chunks: tuple[PromptChunk, ...] = ()
        if table.num_wanting_prompt_logprobs:
            prompt_chunks, places = self._prompt_positions.plan(rows, counts)
            writer.ask_prompt_logprobs(places)
        computed = table.num_computed_tokens[rows] + counts
        planned = table.num_planned_tokens[rows]
        samples = computed == planned
        planned += samples
        table.num_computed_tokens[rows] = computed
        table.num_planned_tokens[rows] = planned
        table.last_ticket[rows] = ticket
        if rows is not self._batch.rows:
            self._batch = Batch.of(rows, table)
        masks = None if self._batch.grammar_workers is None else self._mask_requests.plan(self._batch, samples)
        planned_ns = self._clock()
        num_tokens = writer.finish(self._batch, counts, samples, masks, planned_ns)
        self._admission.queue.sampled(rows[samples])
        self._prefixes.offer_full(rows)  # before `stop` frees blocks of some of these rows
        step = PlannedStep(
            ticket, plan_ns, planned_ns, self._batch, samples, num_tokens - len(rows), writer.leases, masks,
            prompt_chunks,
        )  # fmt: skip
        self._counts["num_steps"] += 1
        self._counts["num_prefill_steps"] += step.num_prompt_tokens > 0
        is_planned_out = planned == table.max_len[rows]
        if is_planned_out.any():  # the last token of a sequence is sampled and never computed: it needs no block
            self.stop(rows[is_planned_out].tolist())
        return step
