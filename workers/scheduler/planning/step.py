"""A step: what the planner writes into its record, and what the scheduler remembers of it until its result arrives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ipc.records import StepRecord, StepShape
from workers.scheduler.array_types import BoolArray, IntArray
from workers.scheduler.prompt_lease import PromptLease
from workers.scheduler.sequence import Sequence
from workers.scheduler.sequence_table import SequenceTable


@dataclass(frozen=True)
class Batch:
    """The sequences of a step, in the record's order. Successive decode steps share one Batch."""

    rows: IntArray  # [num_seqs]
    generations: IntArray  # [num_seqs], of each row when the step was planned
    variant: int  # the most demanding SamplerVariant of any of them
    want_logprobs: int  # the largest of any of them
    want_processed: int  # 1 if any of them wants processed log-probabilities

    @classmethod
    def of(cls, rows: IntArray, table: SequenceTable) -> Batch:
        most = (
            int(column[rows].max(initial=0)) for column in (table.variant, table.want_logprobs, table.want_processed)
        )
        return cls(rows, table.generation[rows], *most)


@dataclass(frozen=True)
class PlannedStep:
    """A step in flight: what is needed to apply its result."""

    ticket: int
    batch: Batch
    samples: BoolArray  # [num_seqs], whether the step samples a token for the sequence
    num_prompt_tokens: int  # tokens beyond one for each sequence
    leases: list[PromptLease]  # on the prompt records that its admissions are copied from


class StepWriter:
    """Fills one step record. The record is unchanged until something is added."""

    __slots__ = ("_max_appends", "_num_admissions", "_num_appends", "_record", "leases")

    def __init__(self, record: StepRecord, shape: StepShape) -> None:
        self.leases: list[PromptLease] = []  # on the prompt records of this step's admissions
        self._record = record
        self._max_appends = shape.max_appends
        self._num_appends = 0
        self._num_admissions = 0

    def append_blocks(self, row: Any, index: IntArray, block: Any) -> None:
        """Write entries of the block tables: entry `index` of `row` becomes `block`. `row` is one row or [n]."""
        start, end = self._num_appends, self._num_appends + len(index)
        assert end <= self._max_appends, f"{end} block-table entries in one step, {self._max_appends} fit"
        record = self._record
        record.append_row[start:end] = row
        record.append_index[start:end] = index
        record.append_block[start:end] = block
        self._num_appends = end

    def add_admission(
        self,
        sequence: Sequence,
        num_cached: int,
        lease: PromptLease | None = None,
        long_lease: PromptLease | None = None,
    ) -> None:
        """Write an admission, or a resumption without leases. `num_cached` of its tokens have their KV already."""
        sequence.write_admission(self._record.admit, self._num_admissions, num_cached, lease, long_lease)
        self._num_admissions += 1
        self.leases += [each for each in (lease, long_lease) if each is not None]

    def finish(self, batch: Batch, counts: IntArray, samples: BoolArray, planned_at_ns: int) -> int:
        """Write the sequences, the tokens of each, and whether each samples one. Returns the number of tokens."""
        record, n = self._record, len(batch.rows)
        num_tokens = int(counts.sum())
        record.num_appends[0] = self._num_appends
        record.num_admissions[0] = self._num_admissions
        record.num_seqs[0] = n
        record.num_tokens[0] = num_tokens
        record.variant[0] = batch.variant
        record.want_logprobs[0] = batch.want_logprobs
        record.want_processed[0] = batch.want_processed
        record.planned_at_ns[0] = planned_at_ns
        record.seq_row[:n] = batch.rows
        record.seq_num_tokens[:n] = counts
        record.seq_sample[:n] = samples
        return num_tokens
