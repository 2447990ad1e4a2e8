"""Adjusts logits before the sampler sees them: token masks, bad words, bias, ends, thinking, penalties, grammar masks.

The stage runs only in steps whose variant is ADJUSTED. It writes float32 logits of every sequence of the step to a
buffer of its own; those of a sequence without adjustments are the model's. The model's logits stay as they are.

Whatever depends on the sequence's tokens is computed from the row's ids, anew in each step. There is no table of counts
that preemption, resumption or a new owner of the row could leave stale, and an id is in the row as soon as an earlier
step has sampled it. Reading four bytes for each token is nothing beside reading the token's keys and values.

The order is that of vLLM: allowed tokens, bad words, bias, minimum length, thinking budget, penalties, grammar. An
excluded token gets -inf. NaN and +inf stay, so that the sampler still sees that the model has failed.

The torch code here runs on the CPU, and is the oracle in tests of the kernels that run on CUDA
(`triton_adjustments.py`). It looks at values on the host and works only on sequences that ask for something.

To add an adjustment: a column in AdmittedColumns (`ipc/records.py`) or LongColumns (`ipc/long_values.py`), a function
here, its counterpart in the kernels, and a case to the tests of both.
"""

from __future__ import annotations

from typing import Final

import torch

from ipc.long_values import BAD_WORDS, BIAS_IDS, TOKEN_MASK
from ipc.records import NO_TOKEN
from workers.gpu.execution.row_tables import RowTables
from workers.gpu.execution.step_batch import StepBatch
from workers.gpu.execution.tensor_views import StepTensors

MASK_BITS: Final = 32  # of a mask's word
_LARGEST: Final = torch.finfo(torch.float32).max


def adjust(
    logits: torch.Tensor,
    batch: StepBatch,
    tables: RowTables,
    step: StepTensors,
    masks: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Write the step's adjusted logits to `out` [S, vocab_size] float32.

    Args:
        logits: [S, vocab_size], the model's (on CUDA bfloat16, float16 or float32).
        masks: [max_num_seqs, mask_words] int32, the masks that `step.seq_mask` names; see StepShape.mask_words.

    Sequences that sample no token in this step, and padding, get any finite values of the model's.
    """
    if logits.is_cuda:
        from workers.gpu.sampling import triton_adjustments  # imported here: only CUDA needs triton

        triton_adjustments.adjust(logits, batch, tables, step, masks, out)
        return
    num_seqs = batch.num_seqs
    out.copy_(logits)
    is_sampled = (step.seq_sample[:num_seqs] != 0) & (batch.seq_lens > 0)  # [S] bool
    for i in (is_sampled & _asks(tables)[batch.seq_row]).nonzero()[:, 0].tolist():
        _Row(i, batch, tables).adjust(out[i])
    masked = (is_sampled & (step.seq_mask[:num_seqs] >= 0)).nonzero()[:, 0]
    if len(masked):
        out[masked] = exclude_by_masks(out[masked], masks[step.seq_mask[masked]])
    is_broken = logits.isnan() | logits.isposinf()
    torch.where(is_broken, logits.float(), out, out=out)


def _asks(tables: RowTables) -> torch.Tensor:
    """[rows] bool: whether a row asks for something besides a grammar's mask."""
    return (
        (tables.long_columns != 0)
        | (tables.min_tokens > 0)
        | (tables.think_budget >= 0)
        | (tables.repetition_penalty != 1)
        | (tables.presence_penalty != 0)
        | (tables.frequency_penalty != 0)
    )


class _Row:
    """One sequence of a step."""

    def __init__(self, i: int, batch: StepBatch, tables: RowTables) -> None:
        row, num_tokens = int(batch.seq_row[i]), int(batch.seq_lens[i])
        self._tables = tables
        self._row = row
        self._prompt_len = int(tables.prompt_len[row])
        self._ids = tables.token_ids[row, :num_tokens].to(torch.int64)  # prompt and output
        self._output = self._ids[self._prompt_len :]
        self._columns = int(tables.long_columns[row])

    def adjust(self, x: torch.Tensor) -> None:
        """Adjust the logits `x` [vocab_size] float32 in place, except for a grammar's mask."""
        tables, row = self._tables, self._row
        if self._columns & TOKEN_MASK:
            x.copy_(exclude_by_masks(x[None], tables.long_values.token_mask[row][None])[0])
        excluded = self._ends_of_bad_words() if self._columns & BAD_WORDS else []
        if self._columns & BIAS_IDS:
            ids = tables.long_values.bias_ids[row]
            is_used = ids != NO_TOKEN
            x.index_add_(0, ids[is_used].to(torch.int64), tables.long_values.bias_values[row][is_used])
        if len(self._output) < int(tables.min_tokens[row]):
            excluded += [token for token in tables.end_ids[row].tolist() if 0 <= token < len(x)]
        x[excluded] = -torch.inf
        if self._must_end_thinking():
            kept = int(tables.think_end[row])
            value = x[kept].clone()
            x.fill_(-torch.inf)
            x[kept] = value
        self._penalise(x)

    def _ends_of_bad_words(self) -> list[int]:
        """The last token of each bad word whose other tokens are the newest of the output."""
        words: list[list[int]] = [[]]
        for token in self._tables.long_values.bad_words[self._row].tolist():
            if token == NO_TOKEN:
                words.append([])
            else:
                words[-1].append(token)
        output = self._output.tolist()
        return [
            word[-1]
            for word in words
            if word and len(output) >= len(word) - 1 and output[len(output) - len(word) + 1 :] == word[:-1]
        ]

    def _must_end_thinking(self) -> bool:
        """Whether thinking has begun, has not ended, and has used up its budget with tokens of the output."""
        tables, row = self._tables, self._row
        budget, start, end = (
            int(column[row]) for column in (tables.think_budget, tables.think_start, tables.think_end)
        )
        if budget < 0 or end == NO_TOKEN:
            return False
        starts, ends = (self._ids == start).nonzero(), (self._ids == end).nonzero()
        last_start = int(starts[-1]) if len(starts) else -1
        last_end = int(ends[-1]) if len(ends) else -1
        used = len(self._ids) - max(last_start + 1, self._prompt_len)
        return last_start > last_end and used >= budget

    def _penalise(self, x: torch.Tensor) -> None:
        tables, row = self._tables, self._row
        repetition, presence, frequency = (
            column[row] for column in (tables.repetition_penalty, tables.presence_penalty, tables.frequency_penalty)
        )
        if repetition == 1 and presence == 0 and frequency == 0:
            return
        counts = torch.bincount(self._output, minlength=len(x)).float()
        is_known = torch.bincount(self._ids, minlength=len(x)) > 0
        repeated = torch.where(x > 0, (x / repetition).clamp(max=_LARGEST), x * repetition)  # +inf would mean a failure
        x.copy_(torch.where(is_known, repeated, x))
        x -= frequency * counts + presence * (counts > 0)


def exclude_by_masks(x: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Return the logits `x` [n, vocab_size] with -inf for tokens whose bit in `words` [n, mask_words] is 0.

    Tokens beyond the mask are excluded.
    """
    places = torch.arange(MASK_BITS, dtype=torch.int32, device=x.device)
    is_allowed = ((words[:, :, None] >> places) & 1).bool().flatten(1)[:, : x.shape[1]]
    excluded = torch.full_like(x, -torch.inf)
    num_known = is_allowed.shape[1]
    excluded[:, :num_known] = torch.where(is_allowed, x[:, :num_known], -torch.inf)
    return excluded
