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

from ipc.long_values import BAD_WORDS, BIAS_IDS, MAX_BAD_WORD_IDS, TOKEN_MASK
from ipc.records import MAX_END_IDS, NO_TOKEN
from ipc.sampling_params import MAX_LOGIT_BIAS
from workers.gpu.execution.row_tables import RowTables
from workers.gpu.execution.step_batch import StepBatch
from workers.gpu.execution.tensor_views import StepTensors

_BLOCK: Final = 4096  # logits of one program; a multiple of the bits of a mask's word
_IDS: Final = 1024  # token ids that a program reads at a time
_COUNTERS: Final = 8  # programs that count one row's ids

_INF = tl.constexpr(float("inf"))
_NO_TOKEN = tl.constexpr(NO_TOKEN)
_TOKEN_MASK = tl.constexpr(TOKEN_MASK)
_BIAS = tl.constexpr(BIAS_IDS)
_BAD_WORDS = tl.constexpr(BAD_WORDS)
_KNOWN = tl.constexpr(1 << 30)  # the bit of a count that says: among the row's ids. The lower bits count output.


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
    _look_for_thinking[(num_seqs,)](
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
    _compute_biased[(num_seqs,)](
        *bias, counts, logits, logits.stride(0), out.stride(0), vocab_size, batch.seq_row, batch.seq_lens,
        step.seq_sample, *penalties, MAX_BIAS=MAX_LOGIT_BIAS,
    )  # fmt: skip
    _penalise[(num_seqs, num_blocks)](out, counts, *dense, BLOCK=_BLOCK, num_warps=8)
    _scatter[(num_seqs,)](
        out, out.stride(0), logits, logits.stride(0), vocab_size, *sequence, tables.prompt_len, *bias,
        long_values.bad_words, tables.min_tokens, tables.end_ids, MAX_BIAS=MAX_LOGIT_BIAS,
        NUM_END_IDS=MAX_END_IDS, MAX_ENDS=triton.next_power_of_2(MAX_END_IDS), MAX_IDS=MAX_BAD_WORD_IDS, num_warps=8,
    )  # fmt: skip


@triton.jit
def _look_for_thinking(
    forced: tl.tensor,  # [S] int32: the one token that may follow; NO_TOKEN = any
    seq_row: tl.tensor,
    seq_lens: tl.tensor,
    seq_sample: tl.tensor,
    token_ids: tl.tensor,
    max_model_len: tl.tensor,
    prompt_lens: tl.tensor,
    budgets: tl.tensor,
    starts: tl.tensor,
    ends: tl.tensor,
    IDS: tl.constexpr,
) -> None:
    """Grid (S)."""
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(seq_row + i).to(tl.int64)
    length = tl.load(seq_lens + i)
    budget, end = tl.load(budgets + row), tl.load(ends + row)
    tl.store(forced + i, _NO_TOKEN)
    if (budget < 0) | (end == _NO_TOKEN) | (length == 0):
        return
    start = tl.load(starts + row)
    last_start = tl.full([], -1, tl.int32)
    last_end = tl.full([], -1, tl.int32)
    place = tl.arange(0, IDS)
    for first in range(0, length, IDS):
        at = first + place
        ids = tl.load(token_ids + row * max_model_len + at, mask=at < length, other=_NO_TOKEN)
        last_start = tl.maximum(last_start, tl.max(tl.where(ids == start, at, -1), axis=0))
        last_end = tl.maximum(last_end, tl.max(tl.where(ids == end, at, -1), axis=0))
    used = length - tl.maximum(last_start + 1, tl.load(prompt_lens + row))
    if (last_start > last_end) & (used >= budget):
        tl.store(forced + i, end)


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
    if is_sampled & _is_penalised(row, repetitions, presences, frequencies):
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
    if (tl.load(seq_sample + i) == 0) | (_is_penalised(row, repetitions, presences, frequencies) == 0):
        return
    prompt_len = tl.load(prompt_lens + row)
    place = tl.arange(0, IDS)
    for first in range(tl.program_id(1) * IDS, length, tl.num_programs(1) * IDS):
        at = first + place
        ids = tl.load(token_ids + row * max_model_len + at, mask=at < length, other=_NO_TOKEN)
        is_id = (ids >= 0) & (ids < vocab_size)
        target = counts + i * out_stride + ids
        tl.atomic_or(target, tl.full([IDS], _KNOWN, tl.int32), mask=is_id, sem="relaxed")
        tl.atomic_add(target, tl.full([IDS], 1, tl.int32), mask=is_id & (at >= prompt_len), sem="relaxed")


@triton.jit
def _compute_biased(
    biased: tl.tensor,  # [S, MAX_BIAS] float32
    long_columns: tl.tensor,
    bias_ids: tl.tensor,
    bias_values: tl.tensor,
    counts: tl.tensor,
    logits: tl.tensor,
    logits_stride: tl.tensor,
    out_stride: tl.tensor,
    vocab_size: tl.tensor,
    seq_row: tl.tensor,
    seq_lens: tl.tensor,
    seq_sample: tl.tensor,
    repetitions: tl.tensor,
    presences: tl.tensor,
    frequencies: tl.tensor,
    MAX_BIAS: tl.constexpr,
) -> None:
    """Grid (S)."""
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(seq_row + i).to(tl.int64)
    if (tl.load(seq_sample + i) == 0) | ((tl.load(long_columns + row) & _BIAS) == 0):
        return
    place = tl.arange(0, MAX_BIAS)
    ids = tl.load(bias_ids + row * MAX_BIAS + place)
    is_used = (ids >= 0) & (ids < vocab_size)
    x = tl.load(logits + i * logits_stride + ids, mask=is_used, other=0.0).to(tl.float32)
    x += tl.load(bias_values + row * MAX_BIAS + place)
    if _is_penalised(row, repetitions, presences, frequencies):
        count = tl.load(counts + i * out_stride + ids, mask=is_used, other=0)
        x = _penalised(x, count, row, repetitions, presences, frequencies)
    tl.store(biased + i * MAX_BIAS + place, x)


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
    if (is_sampled == 0) | (_is_penalised(row, repetitions, presences, frequencies) == 0):
        return
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_real = token < vocab_size
    x = tl.load(logits + i * logits_stride + token, mask=is_real, other=0.0).to(tl.float32)
    count = tl.load(counts + i * out_stride + token, mask=is_real, other=0)
    x = _penalised(x, count, row, repetitions, presences, frequencies)
    x = _exclude(x, token, i, row, forced, long_columns, token_masks, token_mask_words, seq_mask, masks, mask_words)
    tl.store(out + i * out_stride + token, x, mask=is_real)


@triton.jit
def _scatter(
    out: tl.tensor,
    out_stride: tl.tensor,
    logits: tl.tensor,
    logits_stride: tl.tensor,
    vocab_size: tl.tensor,
    seq_row: tl.tensor,
    seq_lens: tl.tensor,
    seq_sample: tl.tensor,
    token_ids: tl.tensor,
    max_model_len: tl.tensor,
    prompt_lens: tl.tensor,
    biased: tl.tensor,
    long_columns: tl.tensor,
    bias_ids: tl.tensor,
    bias_values: tl.tensor,
    bad_words: tl.tensor,
    min_tokens: tl.tensor,
    end_ids: tl.tensor,
    MAX_BIAS: tl.constexpr,
    NUM_END_IDS: tl.constexpr,
    MAX_ENDS: tl.constexpr,
    MAX_IDS: tl.constexpr,
) -> None:
    """Grid (S)."""
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(seq_row + i).to(tl.int64)
    length = tl.load(seq_lens + i)
    if (tl.load(seq_sample + i) == 0) | (length == 0):
        return
    own_out, own_logits = out + i * out_stride, logits + i * logits_stride
    columns = tl.load(long_columns + row)
    prompt_len = tl.load(prompt_lens + row)
    if columns & _BIAS:
        place = tl.arange(0, MAX_BIAS)
        ids = tl.load(bias_ids + row * MAX_BIAS + place)
        is_used = (ids >= 0) & (ids < vocab_size)
        value = tl.load(biased + i * MAX_BIAS + place)
        before = tl.load(own_out + ids, mask=is_used, other=0.0)
        tl.store(own_out + ids, value, mask=is_used & (before != -_INF))
        tl.debug_barrier()
    if columns & _BAD_WORDS:
        place = tl.arange(0, MAX_IDS)
        words = bad_words + row * MAX_IDS
        ids = tl.load(words + place)
        behind = tl.load(words + place + 1, mask=place + 1 < MAX_IDS, other=_NO_TOKEN)
        is_match = (ids != _NO_TOKEN) & (behind == _NO_TOKEN)  # of all words, the last token
        # Step back through all words and the output at once, until every word has matched or failed.
        back = tl.full([], 1, tl.int32)
        is_open = is_match
        while tl.max(is_open.to(tl.int32), axis=0) > 0:
            wanted = tl.load(words + place - back, mask=is_open & (place >= back), other=_NO_TOKEN)
            is_open = is_open & (wanted != _NO_TOKEN)
            at = length - back
            found = tl.load(token_ids + row * max_model_len + at, mask=at >= prompt_len, other=_NO_TOKEN)
            is_match = is_match & ((is_open == 0) | (wanted == found))
            is_open = is_open & is_match
            back += 1
        _exclude_ids(own_out, own_logits, ids, is_match, vocab_size)
    if length - prompt_len < tl.load(min_tokens + row):
        place = tl.arange(0, MAX_ENDS)
        ids = tl.load(end_ids + row * NUM_END_IDS + place, mask=place < NUM_END_IDS, other=_NO_TOKEN)
        _exclude_ids(own_out, own_logits, ids, ids != _NO_TOKEN, vocab_size)


@triton.jit
def _is_penalised(row: tl.tensor, repetitions: tl.tensor, presences: tl.tensor, frequencies: tl.tensor) -> tl.tensor:
    return (tl.load(repetitions + row) != 1.0) | (tl.load(presences + row) != 0.0) | (tl.load(frequencies + row) != 0.0)


@triton.jit
def _penalised(
    x: tl.tensor,
    count: tl.tensor,
    row: tl.tensor,
    repetitions: tl.tensor,
    presences: tl.tensor,
    frequencies: tl.tensor,
) -> tl.tensor:
    repetition = tl.load(repetitions + row)
    x = tl.where(count >= _KNOWN, tl.where(x > 0, x / repetition, x * repetition), x)
    num_output = (count & (_KNOWN - 1)).to(tl.float32)
    return x - (tl.load(frequencies + row) * num_output + tl.where(num_output > 0, tl.load(presences + row), 0.0))


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


@triton.jit
def _exclude_ids(
    out: tl.tensor, logits: tl.tensor, ids: tl.tensor, is_excluded: tl.tensor, vocab_size: tl.tensor
) -> None:
    is_used = is_excluded & (ids >= 0) & (ids < vocab_size)
    x = tl.load(logits + ids, mask=is_used, other=0.0).to(tl.float32)
    tl.store(out + ids, tl.full(ids.shape, -_INF, tl.float32), mask=is_used & (x == x) & (x != _INF))
