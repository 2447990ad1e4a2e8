"""The adjustment stage's kernels with one program for each sequence: see `triton_adjustments.py`.

They read a sequence's ids and lists, and write single logits. Here, too, is the arithmetic of penalties.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ipc.long_values import BAD_WORDS, BIAS_IDS
from ipc.records import NO_TOKEN

KNOWN = tl.constexpr(1 << 30)  # the bit of a count that says: among the row's ids. The lower bits count output.
_INF = tl.constexpr(float("inf"))
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
_NO_TOKEN = tl.constexpr(NO_TOKEN)
_BIAS = tl.constexpr(BIAS_IDS)
_BAD_WORDS = tl.constexpr(BAD_WORDS)


@triton.jit
def look_for_thinking(
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
    """Grid (S). Reads a row's ids from the newest back, to the last start or end of thinking."""
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
    behind = length  # the place behind the ids that are still to be read
    while (behind > 0) & (last_start < 0) & (last_end < 0):
        at = behind - IDS + place
        ids = tl.load(token_ids + row * max_model_len + at, mask=at >= 0, other=_NO_TOKEN)
        last_start = tl.max(tl.where((ids == start) & (at >= 0), at, -1), axis=0)
        last_end = tl.max(tl.where(ids == end, at, -1), axis=0)
        behind = behind - IDS
    used = length - tl.maximum(last_start + 1, tl.load(prompt_lens + row))
    if (last_start > last_end) & (used >= budget):
        tl.store(forced + i, end)


@triton.jit
def compute_biased(
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
    if is_penalised(row, repetitions, presences, frequencies):
        count = tl.load(counts + i * out_stride + ids, mask=is_used, other=0)
        x = penalised(x, count, row, repetitions, presences, frequencies)
    tl.store(biased + i * MAX_BIAS + place, x)


@triton.jit
def scatter(
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
def _exclude_ids(
    out: tl.tensor, logits: tl.tensor, ids: tl.tensor, is_excluded: tl.tensor, vocab_size: tl.tensor
) -> None:
    is_used = is_excluded & (ids >= 0) & (ids < vocab_size)
    x = tl.load(logits + ids, mask=is_used, other=0.0).to(tl.float32)
    tl.store(out + ids, tl.full(ids.shape, -_INF, tl.float32), mask=is_used & (x == x) & (x != _INF))


@triton.jit
def is_penalised(row: tl.tensor, repetitions: tl.tensor, presences: tl.tensor, frequencies: tl.tensor) -> tl.tensor:
    return (tl.load(repetitions + row) != 1.0) | (tl.load(presences + row) != 0.0) | (tl.load(frequencies + row) != 0.0)


@triton.jit
def penalised(
    x: tl.tensor,
    count: tl.tensor,
    row: tl.tensor,
    repetitions: tl.tensor,
    presences: tl.tensor,
    frequencies: tl.tensor,
) -> tl.tensor:
    repetition = tl.load(repetitions + row)
    repeated = tl.where(x > 0, tl.minimum(x / repetition, _LARGEST), x * repetition)  # +inf would mean a failure
    x = tl.where((count >= KNOWN) & (x != _INF), repeated, x)
    num_output = (count & (KNOWN - 1)).to(tl.float32)
    return x - (tl.load(frequencies + row) * num_output + tl.where(num_output > 0, tl.load(presences + row), 0.0))
