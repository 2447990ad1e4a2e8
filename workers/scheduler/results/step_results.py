"""Applies a step's result: new tokens of each sequence, and which sequences it ends.

Owns the applied columns of the sequence table. Ends no sequence itself: the scheduler does.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from ipc.errors import LogitsNotFinite
from ipc.messages import Ended
from ipc.records import FinishCode, ResultRecord
from workers.scheduler.array_types import BoolArray, Int32Array, IntArray
from workers.scheduler.output_buffer import LogprobArrays, OutputBuffer
from workers.scheduler.planning.step import PlannedStep
from workers.scheduler.sequence import Sequence
from workers.scheduler.sequence_table import SequenceTable

_LENGTH: Final = int(FinishCode.LENGTH)
_NOT_FINITE: Final = int(FinishCode.NOT_FINITE)


class SequenceEnds(NamedTuple):
    """The sequences that a result ends."""

    failed: list[Sequence]  # their logits are not finite; they get no token
    finished: list[Sequence]  # they have got their last token


class StepResults:
    """Applies results in ticket order. Counts tokens and ends in `counts`."""

    def __init__(self, table: SequenceTable, outputs: OutputBuffer, counts: dict[str, int]) -> None:
        self._table = table
        self._outputs = outputs
        self._counts = counts

    def apply(self, step: PlannedStep, result: ResultRecord) -> SequenceEnds | None:
        """Append the sampled tokens to their sequences and to the detokenizer's next message.

        Results of sequences that have ended since the step was planned are void: the generations of their rows differ.
        Keeps no reference to `result`. Returns the sequences that end; None: none does.
        """
        table, batch = self._table, step.batch
        rows, n = batch.rows, len(batch.rows)
        is_valid = (table.generation[rows] == batch.generations) & step.samples
        token_ids, finish = result.token_ids[:n], result.finish[:n]
        has_ends = bool(finish.any())
        failed: list[Sequence] = []
        if has_ends:
            is_failed = is_valid & (finish == _NOT_FINITE)
            if is_failed.any():
                failed = self._fail(rows[is_failed])
                is_valid &= ~is_failed
        if not is_valid.all():
            rows, token_ids, finish = rows[is_valid], token_ids[is_valid], finish[is_valid]
        if not rows.size:
            return SequenceEnds(failed, []) if failed else None
        num_tokens = table.num_tokens[rows]
        table.token_ids[rows, num_tokens] = token_ids
        table.num_tokens[rows] = num_tokens + 1
        logprobs = None
        if batch.want_logprobs:
            num_extra = int(table.num_extra_logprobs[rows].max())
            logprobs = _copy_logprobs(result, n, is_valid, batch.want_logprobs - 1, num_extra)
        self._outputs.add_tokens(table.key[rows], token_ids, finish, logprobs)
        self._counts["num_sampled_tokens"] += rows.size
        return SequenceEnds(failed, self._finish(rows, finish)) if has_ends else None

    def _finish(self, rows: IntArray, finish: Int32Array) -> list[Sequence]:
        """The sequences whose new token is their last one."""
        ended = finish.nonzero()[0]
        if not ended.size:
            return []
        rows, finish = rows[ended], finish[ended]
        is_early = (finish == _LENGTH) & (self._table.num_tokens[rows] < self._table.max_len[rows])
        assert not is_early.any(), f"rows {rows[is_early]} ended by length before their length"
        self._counts["num_finished"] += len(rows)
        return self._owners(rows)

    def _fail(self, rows: IntArray) -> list[Sequence]:
        """The sequences whose logits are not finite, after the detokenizer has been told."""
        sequences = self._owners(rows)
        for sequence in sequences:
            text = (
                f"the logits after token {self._table.num_tokens[sequence.row]} of this request are not finite: the "
                'model computed NaN or infinity, as float16 does when activations overflow; model.dtype "bfloat16" or '
                '"float32" avoids that'
            )
            self._outputs.ended.append(
                Ended(key=sequence.key, finish_reason="error", error_code=LogitsNotFinite.code, error_message=text)
            )
        self._counts["num_not_finite"] += len(sequences)
        return sequences

    def _owners(self, rows: IntArray) -> list[Sequence]:
        return [sequence for row in rows.tolist() if (sequence := self._table.sequences[row]) is not None]


def _copy_logprobs(result: ResultRecord, n: int, is_valid: BoolArray, num_top: int, num_extra: int) -> LogprobArrays:
    return LogprobArrays(
        result.logprob[:n][is_valid],
        result.top_ids[:n, :num_top][is_valid],
        result.top_logprobs[:n, :num_top][is_valid],
        result.extra_logprobs[:n, :num_extra][is_valid],
    )
