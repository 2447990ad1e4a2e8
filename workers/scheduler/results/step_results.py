"""Applies a step's result: new tokens of each sequence, and which sequences it ends.

Owns the applied columns of the sequence table. Ends no sequence itself: the scheduler does.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from ipc.messages import PromptLogprobs, TokenLogprobs
from ipc.records import FinishCode, ResultRecord
from workers.scheduler.array_types import BoolArray, Int32Array, IntArray
from workers.scheduler.output_buffer import LogprobArrays, OutputBuffer
from workers.scheduler.planning.step import PlannedStep
from workers.scheduler.results import failures
from workers.scheduler.sequence import NO_WORKER, Sequence
from workers.scheduler.sequence_table import SequenceTable

_LENGTH: Final = int(FinishCode.LENGTH)
_NOT_FINITE: Final = int(FinishCode.NOT_FINITE)
_EXCLUDED: Final = int(FinishCode.EXCLUDED)
_NOBODY: Final[list[Sequence]] = []


class SequenceEnds(NamedTuple):
    """The sequences that a result ends."""

    not_finite: list[Sequence]  # they get no token, and what they have computed is of no use
    excluded: list[Sequence]  # they get no token; what they have computed is right
    finished: list[Sequence]  # they have got their last token


class StepResults:
    """Applies results in ticket order. Counts tokens and ends in `counts`. Errors state `mask_timeout_s`."""

    def __init__(
        self, table: SequenceTable, outputs: OutputBuffer, counts: dict[str, int], mask_timeout_s: float
    ) -> None:
        self._table = table
        self._outputs = outputs
        self._counts = counts
        self._mask_timeout_s = mask_timeout_s

    def apply(self, step: PlannedStep, result: ResultRecord) -> SequenceEnds | None:
        """Append the sampled tokens to their sequences and to the detokenizer's next message.

        Results of sequences that have ended since the step was planned are void: the generations of their rows differ.
        Keeps no reference to `result`. Returns the sequences that end; None: none does.
        """
        if step.prompt_chunks:
            self._add_prompt_logprobs(step, result)
        table, batch = self._table, step.batch
        rows, n = batch.rows, len(batch.rows)
        is_valid = (table.generation[rows] == batch.generations) & step.samples
        token_ids, finish = result.token_ids[:n], result.finish[:n]
        has_ends = bool(finish.any())
        not_finite = excluded = _NOBODY
        if has_ends:
            is_failed = is_valid & (finish >= _NOT_FINITE)
            if is_failed.any():
                not_finite, excluded = self._fail(rows[is_failed], finish[is_failed], result)
                is_valid &= ~is_failed
        if not is_valid.all():
            rows, token_ids, finish = rows[is_valid], token_ids[is_valid], finish[is_valid]
        if not rows.size:
            return SequenceEnds(not_finite, excluded, _NOBODY) if not_finite or excluded else None
        num_tokens = table.num_tokens[rows]
        table.token_ids[rows, num_tokens] = token_ids
        table.num_tokens[rows] = num_tokens + 1
        logprobs = None
        if batch.want_logprobs:
            num_extra = int(table.num_extra_logprobs[rows].max())
            logprobs = _copy_logprobs(result, n, is_valid, batch.want_logprobs - 1, num_extra)
        self._outputs.add_tokens(table.key[rows], token_ids, finish, logprobs)
        self._counts["num_sampled_tokens"] += rows.size
        if not has_ends:
            return None
        if batch.grammar_workers is not None:
            is_cut_off = (finish == _LENGTH) & (table.grammar_worker[rows] != NO_WORKER)
            self._counts["num_structured_unfinished"] += int(is_cut_off.sum())
        return SequenceEnds(not_finite, excluded, self._finish(rows, finish))

    def _add_prompt_logprobs(self, step: PlannedStep, result: ResultRecord) -> None:
        """Add the log-probabilities of prompts to the detokenizer's next message.

        Leaves out those of ended sequences, and those that were sent before the GPU process was replaced.
        """
        table = self._table
        for chunk in step.prompt_chunks:
            last = chunk.position + chunk.end - chunk.start
            first = max(chunk.position, int(table.num_prompt_logprobs[chunk.row]) + 1)
            if table.generation[chunk.row] == chunk.generation and first < last:
                table.num_prompt_logprobs[chunk.row] = last - 1
                entries, num_top = slice(chunk.start + first - chunk.position, chunk.end), chunk.num_top
                columns = TokenLogprobs(
                    num_top,
                    result.prompt_logprob[entries].tobytes(),
                    result.prompt_top_ids[entries, :num_top].tobytes(),
                    result.prompt_top_logprobs[entries, :num_top].tobytes(),
                )
                part = PromptLogprobs(table.token_ids[chunk.row, first:last].tobytes(), columns)
                self._outputs.prompt_logprobs.append((int(table.key[chunk.row]), part))

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

    def _fail(self, rows: IntArray, finish: Int32Array, result: ResultRecord) -> tuple[list[Sequence], list[Sequence]]:
        """The sequences that are not finite, and those whose tokens are all excluded, after the detokenizer has been
        told."""
        table, ended = self._table, self._outputs.ended
        not_finite = self._owners(rows[finish == _NOT_FINITE])
        ended += [failures.not_finite(each, int(table.num_tokens[each.row])) for each in not_finite]
        excluded = self._owners(rows[finish == _EXCLUDED])
        for each in excluded:
            late_after_s = None
            if each.has_grammar and result.closed_masks[each.grammar_worker]:
                late_after_s = self._mask_timeout_s
            ended.append(failures.excluded(each, int(table.num_tokens[each.row]), late_after_s))
        self._counts["num_not_finite"] += len(not_finite)
        self._counts["num_excluded"] += len(excluded)
        return not_finite, excluded

    def _owners(self, rows: IntArray) -> list[Sequence]:
        return [sequence for row in rows.tolist() if (sequence := self._table.sequences[row]) is not None]


def _copy_logprobs(result: ResultRecord, n: int, is_valid: BoolArray, num_top: int, num_extra: int) -> LogprobArrays:
    return LogprobArrays(
        result.logprob[:n][is_valid],
        result.top_ids[:n, :num_top][is_valid],
        result.top_logprobs[:n, :num_top][is_valid],
        result.extra_logprobs[:n, :num_extra][is_valid],
    )
