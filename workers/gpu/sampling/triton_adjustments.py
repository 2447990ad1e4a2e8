"""The adjustment stage on CUDA: the work of `adjustments.adjust`, in six launches that a graph can capture.

    thinking | begin | count | bias values | penalise | scatter

- thinking: one program per sequence finds out whether only the end-of-thinking token may follow.
- begin: writes each logit as float32, excluded by masks; of a sequence with penalties, writes the integer 0 instead.
- count: counts the row's ids in these integers: `float32` memory serves as int32 until "penalise" has read it.
- bias values: computes the penalised, biased logits of biased tokens, while the counts are still there.
- penalise: turns each count into the penalised logit, excluded by masks.
- scatter: one program per sequence writes the biased logits, then excludes ends of bad words and early ends.

Each program first reads its sequence's columns. It returns at once if the sequence asks for nothing of what it does.
So a step whose sequences have only grammar masks pays for "begin" and five empty launches.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from ipc.long_values import MAX_BAD_WORD_IDS, TOKEN_MASK
from ipc.records import MAX_END_IDS, NO_TOKEN
from ipc.sampling_params import MAX_LOGIT_BIAS
from workers.gpu.execution.row_tables import RowTables
from workers.gpu.execution.step_batch import StepBatch
from workers.gpu.execution.tensor_views import StepTensors
from workers.gpu.sampling.triton_adjusted_rows import (
    KNOWN,
    compute_biased,
    is_penalised,
    look_for_thinking,
    penalised,
    scatter,
)

_BLOCK: Final = 4096  # logits of one program; a multiple of the bits of a mask's word
_IDS: Final = 1024  # token ids that a program reads at a time
_COUNTERS: Final = 8  # programs that count one row's ids

_INF = tl.constexpr(float("inf"))
_NO_TOKEN = tl.constexpr(NO_TOKEN)
_TOKEN_MASK = tl.constexpr(TOKEN_MASK)


def adjust(
    logits: torch.Tensor,
    batch: StepBatch,
    tables: RowTables,
    step: StepTensors,
    masks: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """See `adjustments.adjust`. `logits` and `out` are contiguous within a row."""
    num_seqs, vocab_size = logits.shape
    assert logits.stride(1) == out.stride(1) == 1, "the logits of a row must be contiguous"
    num_blocks = triton.cdiv(vocab_size, _BLOCK)
    forced = torch.empty(num_seqs, dtype=torch.int32, device=logits.device)
    biased = torch.empty(num_seqs, MAX_LOGIT_BIAS, dtype=torch.float32, device=logits.device)
    counts = out.view(torch.int32)
    long_values = tables.long_values
    sequence = (batch.seq_row, batch.seq_lens, step.seq_sample, tables.token_ids, tables.token_ids.stride(0))
    penalties = (tables.repetition_penalty, tables.presence_penalty, tables.frequency_penalty)
    look_for_thinking[(num_seqs,)](
        forced, *sequence, tables.prompt_len, tables.think_budget, tables.think_start, tables.think_end, IDS=_IDS
    )
    dense = (
        logits, logits.stride(0), out.stride(0), vocab_size, forced, batch.seq_row, batch.seq_lens, step.seq_sample,
        *penalties, tables.long_columns, long_values.token_mask, long_values.token_mask.stride(0), step.seq_mask, masks,
        masks.stride(0),
    )  # fmt: skip
    _begin[(num_seqs, num_blocks)](out, counts, *dense, BLOCK=_BLOCK, num_warps=8)
    _count[(num_seqs, _COUNTERS)](counts, out.stride(0), vocab_size, *sequence, tables.prompt_len, *penalties, IDS=_IDS)
    bias = (biased, tables.long_columns, long_values.bias_ids, long_values.bias_values)
    compute_biased[(num_seqs,)](
        *bias, counts, logits, logits.stride(0), out.stride(0), vocab_size, batch.seq_row, batch.seq_lens,
        step.seq_sample, *penalties, MAX_BIAS=MAX_LOGIT_BIAS,
    )  # fmt: skip
    _penalise[(num_seqs, num_blocks)](out, counts, *dense, BLOCK=_BLOCK, num_warps=8)
    scatter[(num_seqs,)](
        out, out.stride(0), logits, logits.stride(0), vocab_size, *sequence, tables.prompt_len, *bias,
        long_values.bad_words, tables.min_tokens, tables.end_ids, MAX_BIAS=MAX_LOGIT_BIAS,
        NUM_END_IDS=MAX_END_IDS, MAX_ENDS=triton.next_power_of_2(MAX_END_IDS), MAX_IDS=MAX_BAD_WORD_IDS, num_warps=8,
    )  # fmt: skip


@triton.jit
def _begin(
    out: tl.tensor,
    counts: tl.tensor,  # the same memory as `out`, as int32
    logits: tl.tensor,
    logits_stride: tl.tensor,
    out_stride: tl.tensor,
    vocab_size: tl.tensor,
    forced: tl.tensor,
    seq_row: tl.tensor,
    seq_lens: tl.tensor,
    seq_sample: tl.tensor,
    repetitions: tl.tensor,
    presences: tl.tensor,
    frequencies: tl.tensor,
    long_columns: tl.tensor,
    token_masks: tl.tensor,
    token_mask_words: tl.tensor,
    seq_mask: tl.tensor,
    masks: tl.tensor,
    mask_words: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Grid (S, blocks of a row)."""
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(seq_row + i).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_real = token < vocab_size
    is_sampled = (tl.load(seq_sample + i) != 0) & (tl.load(seq_lens + i) > 0)
    if is_sampled & is_penalised(row, repetitions, presences, frequencies):
        tl.store(counts + i * out_stride + token, tl.zeros([BLOCK], tl.int32), mask=is_real)
        return
    x = tl.load(logits + i * logits_stride + token, mask=is_real, other=0.0).to(tl.float32)
    if is_sampled:
        x = _exclude(x, token, i, row, forced, long_columns, token_masks, token_mask_words, seq_mask, masks, mask_words)
    tl.store(out + i * out_stride + token, x, mask=is_real)


@triton.jit
def _count(
    counts: tl.tensor,
    out_stride: tl.tensor,
    vocab_size: tl.tensor,
    seq_row: tl.tensor,
    seq_lens: tl.tensor,
    seq_sample: tl.tensor,
    token_ids: tl.tensor,
    max_model_len: tl.tensor,
    prompt_lens: tl.tensor,
    repetitions: tl.tensor,
    presences: tl.tensor,
    frequencies: tl.tensor,
    IDS: tl.constexpr,
) -> None:
    """Grid (S, counters of a row). The counters share the row's ids block by block."""
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(seq_row + i).to(tl.int64)
    length = tl.load(seq_lens + i)
    if (tl.load(seq_sample + i) == 0) | (is_penalised(row, repetitions, presences, frequencies) == 0):
        return
    prompt_len = tl.load(prompt_lens + row)
    place = tl.arange(0, IDS)
    for first in range(tl.program_id(1) * IDS, length, tl.num_programs(1) * IDS):
        at = first + place
        ids = tl.load(token_ids + row * max_model_len + at, mask=at < length, other=_NO_TOKEN)
        is_id = (ids >= 0) & (ids < vocab_size)
        target = counts + i * out_stride + ids
        tl.atomic_or(target, tl.full([IDS], KNOWN, tl.int32), mask=is_id, sem="relaxed")
        tl.atomic_add(target, tl.full([IDS], 1, tl.int32), mask=is_id & (at >= prompt_len), sem="relaxed")


@triton.jit
def _penalise(
    out: tl.tensor,
    counts: tl.tensor,
    logits: tl.tensor,
    logits_stride: tl.tensor,
    out_stride: tl.tensor,
    vocab_size: tl.tensor,
    forced: tl.tensor,
    seq_row: tl.tensor,
    seq_lens: tl.tensor,
    seq_sample: tl.tensor,
    repetitions: tl.tensor,
    presences: tl.tensor,
    frequencies: tl.tensor,
    long_columns: tl.tensor,
    token_masks: tl.tensor,
    token_mask_words: tl.tensor,
    seq_mask: tl.tensor,
    masks: tl.tensor,
    mask_words: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Grid (S, blocks of a row)."""
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(seq_row + i).to(tl.int64)
    is_sampled = (tl.load(seq_sample + i) != 0) & (tl.load(seq_lens + i) > 0)
    if (is_sampled == 0) | (is_penalised(row, repetitions, presences, frequencies) == 0):
        return
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_real = token < vocab_size
    x = tl.load(logits + i * logits_stride + token, mask=is_real, other=0.0).to(tl.float32)
    count = tl.load(counts + i * out_stride + token, mask=is_real, other=0)
    x = penalised(x, count, row, repetitions, presences, frequencies)
    x = _exclude(x, token, i, row, forced, long_columns, token_masks, token_mask_words, seq_mask, masks, mask_words)
    tl.store(out + i * out_stride + token, x, mask=is_real)


@triton.jit
def _exclude(
    x: tl.tensor,
    token: tl.tensor,
    i: tl.tensor,
    row: tl.tensor,
    forced: tl.tensor,
    long_columns: tl.tensor,
    token_masks: tl.tensor,
    token_mask_words: tl.tensor,
    seq_mask: tl.tensor,
    masks: tl.tensor,
    mask_words: tl.tensor,
) -> tl.tensor:
    """Return the logits with -inf for what the request's mask, the grammar's mask or the end of thinking excludes."""
    is_kept = (x != x) | (x == _INF)
    is_allowed = token >= 0
    if tl.load(long_columns + row) & _TOKEN_MASK:
        is_allowed = is_allowed & _bit(token_masks + row * token_mask_words, token, token_mask_words)
    mask = tl.load(seq_mask + i).to(tl.int64)
    if mask >= 0:
        is_allowed = is_allowed & _bit(masks + mask * mask_words, token, mask_words)
    only = tl.load(forced + i)
    if only != _NO_TOKEN:
        is_allowed = is_allowed & (token == only)
    return tl.where(is_allowed | is_kept, x, -_INF)


@triton.jit
def _bit(words: tl.tensor, token: tl.tensor, num_words: tl.tensor) -> tl.tensor:
    word = tl.load(words + token // 32, mask=token // 32 < num_words, other=0)
    return ((word >> (token % 32)) & 1) != 0
