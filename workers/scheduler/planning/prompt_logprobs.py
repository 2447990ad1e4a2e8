"""Which positions of prompts get log-probabilities in a step, and the limit of their tokens.

A sequence wants them while `SequenceTable.prompt_logprobs_end` of its row is not 0: from its admission until its prompt
is planned. It is not preempted before that, so each position is asked for once. It begins without cached blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ipc.records import StepShape
from workers.scheduler.array_types import IntArray
from workers.scheduler.sequence_table import SequenceTable


@dataclass(frozen=True)
class PromptChunk:
    """Consecutive positions of one prompt that a step computes: entries `start` to `end` of its result's `prompt_*`."""

    row: int
    generation: int  # of the row when the step was planned
    num_top: int  # likeliest tokens wanted
    position: int  # of the first token that has a log-probability; it follows a token that the step computes
    start: int
    end: int


class PromptPositions:
    """Plans for the rows that want log-probabilities of their prompts. Callers skip it if no row of `table` does."""

    def __init__(self, shape: StepShape, table: SequenceTable) -> None:
        self.max_tokens = shape.max_prompt_logprobs  # in one step, of all these rows
        self._table = table

    def most_tokens(self, rows: IntArray, remaining: IntArray) -> IntArray:
        """The most tokens that each of `rows` may compute in one step, [num_rows]; `remaining` are those it lacks."""
        wants = self._table.prompt_logprobs_end[rows] > 0
        wanted = remaining * wants
        return np.where(wants, self.max_tokens - (wanted.cumsum() - wanted), remaining).clip(0)

    def num_tokens(self, rows: IntArray, counts: IntArray) -> int:
        """How many of a step's tokens belong to rows that want log-probabilities."""
        return int(counts[self._table.prompt_logprobs_end[rows] > 0].sum())

    def plan(self, rows: IntArray, counts: IntArray) -> tuple[tuple[PromptChunk, ...], IntArray]:
        """The positions of a step that computes `counts` tokens of `rows`, before they are counted as computed.

        Returns them by sequence, and as places among the step's tokens for the step record.
        """
        table = self._table
        computed, ends = table.num_computed_tokens[rows], table.prompt_logprobs_end[rows]
        num_wanted = (ends - computed).clip(0, counts)
        wanted = num_wanted.nonzero()[0]
        nums, starts = num_wanted[wanted], num_wanted.cumsum() - num_wanted
        chunks = []
        for i in wanted.tolist():
            row, start = int(rows[i]), int(starts[i])
            sequence = table.sequences[row]
            assert sequence is not None, f"row {row} runs without a sequence"
            chunk = PromptChunk(
                row, int(table.generation[row]), sequence.want_prompt_logprobs - 1, int(computed[i]) + 1, start,
                start + int(num_wanted[i]),
            )  # fmt: skip
            chunks.append(chunk)
        first = counts.cumsum() - counts  # of each sequence among the step's tokens
        places = np.arange(int(nums.sum())) + (first - starts)[wanted].repeat(nums)
        table.prompt_logprobs_planned(rows[computed + counts >= ends])
        return tuple(chunks), places
