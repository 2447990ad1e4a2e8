"""A step: what the planner writes into its record, and what the scheduler remembers of it until its result arrives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ipc.records import SamplerVariant, StepRecord, StepShape
from workers.scheduler.array_types import BoolArray, IntArray
from workers.scheduler.planning.prompt_logprobs import PromptChunk
from workers.scheduler.prompt_lease import PromptLease
from workers.scheduler.sequence import NO_WORKER, Sequence
from workers.scheduler.sequence_table import SequenceTable

NO_MASK: Final = -1
_NO_WORKERS: Final[IntArray] = np.empty(0, np.int64)
_ADJUSTED: Final = int(SamplerVariant.ADJUSTED)


@dataclass(frozen=True)
class Batch:
    """The sequences of a step, in the record's order. Successive decode steps share one Batch."""

    rows: IntArray  # [num_seqs]
    generations: IntArray  # [num_seqs], of each row when the step was planned
    variant: int  # the most demanding SamplerVariant of any of them
    want_logprobs: int  # the largest of any of them
    want_processed: int  # 1 if any of them wants processed log-probabilities
    grammar_workers: IntArray | None  # [num_seqs], of each sequence, NO_WORKER = none; None: no sequence has one

    @classmethod
    def of(cls, rows: IntArray, table: SequenceTable) -> Batch:
        columns = (table.variant, table.want_logprobs, table.want_processed)
        variant, want_logprobs, want_processed = (int(column[rows].max(initial=0)) for column in columns)
        workers = table.grammar_worker[rows] if variant == _ADJUSTED else _NO_WORKERS
        has_grammars = bool(workers.max(initial=NO_WORKER) > NO_WORKER)
        return cls(
            rows, table.generation[rows], variant, want_logprobs, want_processed, workers if has_grammars else None
        )


@dataclass(frozen=True)
class StepMasks:
    """The masks that a step needs: for each grammar process that owes it some, the record and the sequences."""

    tickets: dict[int, int]  # by grammar process: the record of its mask ring
    places: dict[int, IntArray]  # by grammar process: the places in the batch of the sequences, in the masks' order


@dataclass(frozen=True)
class PlannedStep:
    """A step in flight: what is needed to apply its result."""

    ticket: int
    plan_ns: int  # when its planning began
    planned_ns: int
    batch: Batch
    samples: BoolArray  # [num_seqs], whether the step samples a token for the sequence
    num_prompt_tokens: int  # tokens beyond one for each sequence
    leases: list[PromptLease]  # on the prompt records that its admissions are copied from
    masks: StepMasks | None  # None: no sequence that has a grammar samples
    prompt_chunks: tuple[PromptChunk, ...] = ()  # whose log-probabilities it computes


class StepWriter:
    """Fills one step record. The record is unchanged until something is added."""

    __slots__ = ("_max_appends", "_num_admissions", "_num_appends", "_num_prompt_logprobs", "_record", "leases")

    def __init__(self, record: StepRecord, shape: StepShape) -> None:
        self.leases: list[PromptLease] = []  # on the prompt records of this step's admissions
        self._record = record
        self._max_appends = shape.max_appends
        self._num_appends = 0
        self._num_admissions = 0
        self._num_prompt_logprobs = 0

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
        """Write an admission or a resumption, with the leases on what it copies. `num_cached` of its tokens have their
        KV already."""
        sequence.write_admission(self._record.admit, self._num_admissions, num_cached, lease, long_lease)
        self._num_admissions += 1
        self.leases += [each for each in (lease, long_lease) if each is not None]

    def ask_prompt_logprobs(self, places: IntArray) -> None:
        """Ask for the log-probabilities of the tokens that follow these of the step's tokens in their rows."""
        self._num_prompt_logprobs = len(places)
        self._record.prompt_logprob_index[: len(places)] = places

    def finish(
        self, batch: Batch, counts: IntArray, samples: BoolArray, masks: StepMasks | None, planned_at_ns: int
    ) -> int:
        """Write the sequences, the tokens of each, whether each samples one, and which of the masks applies to it.

        Returns the number of tokens.
        """
        record, n = self._record, len(batch.rows)
        num_tokens = int(counts.sum())
        record.num_appends[0] = self._num_appends
        record.num_admissions[0] = self._num_admissions
        record.num_prompt_logprobs[0] = self._num_prompt_logprobs
        record.num_seqs[0] = n
        record.num_tokens[0] = num_tokens
        record.variant[0] = batch.variant
        record.want_logprobs[0] = batch.want_logprobs
        record.want_processed[0] = batch.want_processed
        record.planned_at_ns[0] = planned_at_ns
        record.seq_row[:n] = batch.rows
        record.seq_num_tokens[:n] = counts
        record.seq_sample[:n] = samples
        record.mask_ticket.fill(0)
        if batch.variant == _ADJUSTED:
            record.seq_mask[:n] = NO_MASK
            if masks is not None:
                self._write_masks(masks)
        return num_tokens

    def _write_masks(self, masks: StepMasks) -> None:
        record, first = self._record, 0
        for worker, places in masks.places.items():  # in the order of the workers
            record.mask_ticket[worker] = masks.tickets[worker]
            record.num_masks[worker] = len(places)
            record.seq_mask[places] = np.arange(first, first + len(places))
            first += len(places)
