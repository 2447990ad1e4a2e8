"""Counts what each step computes and reads, from the records that the scheduler writes.

A measured time of attention says nothing without the KV that it read. The device alone knows the length of each row,
so this follows admissions and tokens on the host. Only a profiled process does so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ipc.records import StepRecord


@dataclass(frozen=True)
class StepLoad:
    """The size of one step.

    Args:
        num_seqs: sequences in the step.
        num_tokens: tokens that run through the layers; more than `num_seqs` if prompts are among them.
        num_kv_read: KV entries that attention reads: the lengths of all sequences after the step, summed.
    """

    num_seqs: int
    num_tokens: int
    num_kv_read: int


class StepLoads:
    """Follows the length of each row. Args: num_rows: `max_num_seqs` of the engine."""

    def __init__(self, num_rows: int) -> None:
        self._lengths = np.zeros(num_rows + 1, np.int64)  # one more for the trash row

    def take(self, record: StepRecord) -> StepLoad:
        """Return the load of the next step. Every step's record must come here, in order, before it is released."""
        num_seqs, num_admissions = int(record.num_seqs[0]), int(record.num_admissions[0])
        admitted = record.admit.row[:num_admissions]
        self._lengths[admitted] = record.admit.num_computed_tokens[:num_admissions]
        rows = record.seq_row[:num_seqs]
        self._lengths[rows] += record.seq_num_tokens[:num_seqs]
        return StepLoad(num_seqs, int(record.num_tokens[0]), int(self._lengths[rows].sum()))
