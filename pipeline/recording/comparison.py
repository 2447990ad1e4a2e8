"""Compares the results of replayed steps with the recorded ones, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ipc.long_values import LOGPROB_IDS
from ipc.records import NO_TOKEN, FinishCode, ResultRecord, SamplerVariant, StepRecord

Flags = np.ndarray[Any, np.dtype[np.bool_]]


class Difference(NamedTuple):
    """The first difference: `what` was recorded as `recorded` and is now `found`."""

    step: int  # of the recording, counting from 1
    segment: int
    ticket: int
    row: int
    position: int  # of the token in its sequence, counting from 0
    output_index: int  # of the token in its output, counting from 0; negative in a prompt
    admitted_in: int  # the step that admitted the sequence; 0 = none of this recording
    what: str
    recorded: str
    found: str

    def __str__(self) -> str:
        if self.output_index < 0:
            where = f"prompt position {self.position}"
        else:
            where = f"output token {self.output_index} (position {self.position})"
        return (
            f"first difference in step {self.step} (segment {self.segment}, ticket {self.ticket}): row {self.row}, "
            f"admitted in step {self.admitted_in}, {where}: {self.what} was {self.recorded} and is now {self.found}"
        )


@dataclass
class _Row:
    """The sequence that holds a row."""

    number: int = 0  # of the sequence, counting from 1
    admitted_in: int = 0
    num_tokens: int = 0  # whose keys and values are computed
    prompt_len: int = 0
    has_logprob_ids: bool = False


@dataclass
class Comparison:
    """What is known of all steps so far."""

    num_steps: int = 0
    num_tokens: int = 0
    num_logprobs: int = 0
    num_sequences: int = 0
    num_segments: int = 0
    num_different_tokens: int = 0
    num_different_logprobs: int = 0
    different_steps: set[int] = field(default_factory=set)
    different_sequences: set[int] = field(default_factory=set)
    first: Difference | None = None
    _rows: dict[int, _Row] = field(default_factory=dict)
    _ticket: int = 0

    def begin_segment(self) -> None:
        """The next step is the first one of another process."""
        self.num_segments += 1
        self._rows.clear()

    def add(self, ticket: int, record: StepRecord, recorded: ResultRecord, found: ResultRecord) -> None:
        """Compare a step's results. Tokens and log-probabilities count as different if one bit is."""
        self.num_steps += 1
        self._ticket = ticket
        num_seqs = int(record.num_seqs[0])
        self._admit(record)
        rows = [self._rows.setdefault(row, _Row()) for row in record.seq_row[:num_seqs].tolist()]
        self._compare_prompts(record, rows, recorded, found)
        for row, num_tokens in zip(rows, record.seq_num_tokens[:num_seqs].tolist(), strict=True):
            row.num_tokens += num_tokens
        self._compare_tokens(record, rows, recorded, found)
        if record.want_logprobs[0]:
            self._compare_logprobs(record, rows, recorded, found)

    @property
    def is_same(self) -> bool:
        return self.first is None

    def _admit(self, record: StepRecord) -> None:
        admit = record.admit
        for i in range(int(record.num_admissions[0])):
            row, is_new = int(admit.row[i]), bool(admit.length[i])
            if is_new or row not in self._rows:
                self.num_sequences += 1
                self._rows[row] = _Row(self.num_sequences, self.num_steps)
            of = self._rows[row]
            of.num_tokens, of.prompt_len = int(admit.num_computed_tokens[i]), int(admit.prompt_len[i])
            of.has_logprob_ids = bool(admit.long_columns[i] & LOGPROB_IDS)

    def _compare_tokens(
        self, record: StepRecord, rows: list[_Row], recorded: ResultRecord, found: ResultRecord
    ) -> None:
        seqs = slice(len(rows))
        tokens, finish = recorded.token_ids[seqs], recorded.finish[seqs]
        other_tokens, other_finish = tokens != found.token_ids[seqs], finish != found.finish[seqs]
        self.num_tokens += int(np.count_nonzero((tokens != NO_TOKEN) & (record.seq_sample[seqs] != 0)))
        different = other_tokens | other_finish
        self.num_different_tokens += int(np.count_nonzero(different))
        for i in np.flatnonzero(different).tolist():
            if other_tokens[i]:
                what, pair = "token", (str(tokens[i]), str(found.token_ids[i]))
            else:
                what, pair = "finish code", (_finish(finish[i]), _finish(found.finish[i]))
            self._note(record, i, rows[i], rows[i].num_tokens, what, pair)

    def _compare_logprobs(
        self, record: StepRecord, rows: list[_Row], recorded: ResultRecord, found: ResultRecord
    ) -> None:
        seqs = slice(len(rows))
        is_sampled = record.seq_sample[seqs] != 0
        has_extra = np.array([row.has_logprob_ids for row in rows]) & (record.variant[0] == SamplerVariant.ADJUSTED)
        self.num_logprobs += int(np.count_nonzero(is_sampled))
        for name, which in (
            ("logprob", is_sampled),
            ("top_ids", is_sampled),
            ("top_logprobs", is_sampled),
            ("extra_logprobs", is_sampled & has_extra),
        ):
            ours, theirs = getattr(recorded, name)[seqs], getattr(found, name)[seqs]
            different = which & _differs(ours, theirs)
            self.num_different_logprobs += int(np.count_nonzero(different))
            for i in np.flatnonzero(different).tolist():
                self._note(record, i, rows[i], rows[i].num_tokens, name, _first_pair(ours[i], theirs[i]))

    def _compare_prompts(
        self, record: StepRecord, rows: list[_Row], recorded: ResultRecord, found: ResultRecord
    ) -> None:
        if not (num := int(record.num_prompt_logprobs[0])):
            return
        self.num_logprobs += num
        ends = np.cumsum(record.seq_num_tokens[: len(rows)])
        for name in ("prompt_logprob", "prompt_top_ids", "prompt_top_logprobs"):
            ours, theirs = getattr(recorded, name)[:num], getattr(found, name)[:num]
            different = _differs(ours, theirs)
            self.num_different_logprobs += int(np.count_nonzero(different))
            for k in np.flatnonzero(different).tolist():
                token = int(record.prompt_logprob_index[k])
                i = int(np.searchsorted(ends, token, side="right"))
                at = rows[i].num_tokens + token - int(ends[i] - record.seq_num_tokens[i]) + 1
                self._note(record, i, rows[i], at, name, _first_pair(ours[k], theirs[k]))

    def _note(self, record: StepRecord, i: int, row: _Row, position: int, what: str, pair: tuple[str, str]) -> None:
        self.different_steps.add(self.num_steps)
        self.different_sequences.add(row.number)
        if self.first is None:
            self.first = Difference(
                self.num_steps, self.num_segments, self._ticket, int(record.seq_row[i]), position,
                position - row.prompt_len, row.admitted_in, what, *pair,
            )  # fmt: skip


def _differs(ours: Any, theirs: Any) -> Flags:
    """[n] bool: where entries [n, ...] of 4-byte values differ in a bit. NaN is like NaN."""
    different: Any = ours.view(np.int32) != theirs.view(np.int32)
    of_entry: Flags = different.reshape(len(ours), -1).any(axis=1)
    return of_entry


def _first_pair(ours: Any, theirs: Any) -> tuple[str, str]:
    """The first values that differ in two entries, in full precision."""
    ours, theirs = np.atleast_1d(ours), np.atleast_1d(theirs)
    at = int(np.argmax(ours.view(np.int32) != theirs.view(np.int32)))
    return str(ours[at]), str(theirs[at])


def _finish(code: Any) -> str:
    return FinishCode(code).name if code in FinishCode._value2member_map_ else str(code)
