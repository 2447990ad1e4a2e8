"""The sampler's kernels on CUDA. They do `sampler.sample` in two or three launches, which read the logits once or
twice.

    maxima of parts | race of parts (unless all rows are greedy) | one program per row: filters, end of sequence

Rows are cut into parts, so that even few sequences keep the whole device busy. `triton_filters.py` applies top_k and
top_p to the winners of the parts.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from ipc.records import MAX_END_IDS, NO_TOKEN, FinishCode, SamplerVariant
from workers.gpu.execution.row_tables import RowTables
from workers.gpu.execution.step_batch import StepBatch
from workers.gpu.execution.tensor_views import ResultTensors
from workers.gpu.sampling.triton_filters import load_logits, scale, settle
from workers.gpu.sampling.triton_random import exponential, random_key

_PART: Final = 1024  # elements of a row that share one maximum
_BLOCK_PARTS: Final = 4  # parts that a program of the first two kernels reads, and that the last kernel reads at a time
# The low bits of a float32 that values of this dtype do not use.
_LOW_BITS: Final = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}

_INF = tl.constexpr(float("inf"))
_NO_TOKEN = tl.constexpr(NO_TOKEN)
_STOP = tl.constexpr(int(FinishCode.STOP))
_LENGTH = tl.constexpr(int(FinishCode.LENGTH))
_EXCLUDED = tl.constexpr(int(FinishCode.EXCLUDED))
_NOT_FINITE = tl.constexpr(int(FinishCode.NOT_FINITE))


def sample(
    variant: SamplerVariant,
    logits: torch.Tensor,
    batch: StepBatch,
    sample_flags: torch.Tensor,
    tables: RowTables,
    outputs: ResultTensors,
    adjusted: torch.Tensor | None = None,
) -> torch.Tensor:
    """Do the work of `sampler.sample`, except log-probabilities. Returns every sequence's token, [S] int64.

    `logits` are bfloat16, float16 or float32, and contiguous within a row. Even if they are not finite, the returned
    token lies in the vocabulary. It does not wait for the device, so a graph can capture it.
    """
    own_logits, logits = logits, logits if adjusted is None else adjusted
    num_seqs, vocab_size = logits.shape
    assert logits.stride(1) == own_logits.stride(1) == 1, "the logits of a row must be contiguous"
    num_parts = triton.cdiv(vocab_size, _PART)
    parts_shape = {"PART": _PART, "BLOCK_PARTS": _BLOCK_PARTS}
    grid = (num_seqs, triton.cdiv(num_parts, _BLOCK_PARTS))

    def by_part(dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(num_seqs, num_parts, dtype=dtype, device=logits.device)

    drawn, filtered = variant != SamplerVariant.GREEDY, variant >= SamplerVariant.FILTERED
    maxima, likeliest = by_part(torch.float32), by_part(torch.int32)
    _maxima_of_parts[grid](maxima, likeliest, logits, logits.stride(0), vocab_size, num_parts, **parts_shape)
    scores, winners, masses = maxima, likeliest, maxima  # placeholders, which are not read without a race
    if drawn:
        scores, winners, masses = by_part(torch.float32), by_part(torch.int32), by_part(torch.float32)
        _race_of_parts[grid](
            scores, winners, masses, maxima, logits, logits.stride(0), vocab_size, num_parts,
            batch.seq_row, batch.seq_lens, tables.temperature, tables.min_p, tables.seed,
            FILTERED=filtered, MAX_PARTS=triton.next_power_of_2(num_parts), **parts_shape, num_warps=8,
        )  # fmt: skip
    tokens = torch.empty(num_seqs, dtype=torch.int64, device=logits.device)
    _finish_rows[(num_seqs,)](
        tokens,
        outputs.token_ids,
        outputs.finish,
        tables.token_ids,
        tables.num_computed_tokens,
        maxima,
        likeliest,
        scores,
        winners,
        masses,
        logits,
        logits.stride(0),
        own_logits,
        own_logits.stride(0),
        vocab_size,
        num_parts,
        sample_flags,
        batch.seq_row,
        batch.seq_lens,
        tables.temperature,
        tables.top_k,
        tables.top_p,
        tables.seed,
        tables.end_ids,
        tables.max_len,
        tables.token_ids.stride(0),
        NUM_END_IDS=MAX_END_IDS,
        MAX_END_IDS=triton.next_power_of_2(MAX_END_IDS),
        DRAWN=drawn,
        ADJUSTED=adjusted is not None,
        FILTERED=filtered,
        LOW_BITS=_LOW_BITS[logits.dtype],
        MAX_PARTS=triton.next_power_of_2(num_parts),
        **parts_shape,
        num_warps=16 if filtered else 1,
    )
    return tokens


@triton.jit
def _maxima_of_parts(
    maxima: tl.tensor,
    likeliest: tl.tensor,
    logits: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    num_parts: tl.tensor,
    PART: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
) -> None:
    """Grid (S, blocks of a row). Computes each part's largest logit, [S, parts] float32, and the first token that has
    it.

    A NaN counts as +inf here, so that the maximum shows whether a row's logits are finite.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1) * BLOCK_PARTS + tl.arange(0, BLOCK_PARTS)
    token = part[:, None] * PART + tl.arange(0, PART)[None, :]
    x = tl.load(logits + row * row_stride + token, mask=token < vocab_size, other=-_INF).to(tl.float32)
    x = tl.where(x == x, x, _INF)
    # Places beyond the row hold -inf and come last among equals, so they are not chosen.
    maximum, index = tl.max(x, axis=1, return_indices=True, return_indices_tie_break_left=True)
    at = row * num_parts + part
    tl.store(maxima + at, maximum, mask=part < num_parts)
    tl.store(likeliest + at, part * PART + index, mask=part < num_parts)


@triton.jit
def _race_of_parts(
    scores: tl.tensor,  # [S, parts] float32: the best score of each part
    winners: tl.tensor,  # [S, parts] int32: the token with that score
    masses: tl.tensor,  # [S, parts] float32, with FILTERED: the sum of p / (the likeliest's p)
    maxima: tl.tensor,
    logits: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    num_parts: tl.tensor,
    seq_row: tl.tensor,
    seq_lens: tl.tensor,
    temperatures: tl.tensor,
    min_ps: tl.tensor,
    seeds: tl.tensor,
    FILTERED: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
) -> None:
    """Grid (S, blocks of a row). Runs the race p / e, e ~ Exp(1), in logarithms (see sampler.race). Applies min_p
    already."""
    row = tl.program_id(0).to(tl.int64)
    table_row = tl.load(seq_row + row)
    temperature = tl.load(temperatures + table_row)
    if temperature == 0:
        return
    every_part = tl.arange(0, MAX_PARTS)
    every_maximum = tl.load(maxima + row * num_parts + every_part, mask=every_part < num_parts, other=-_INF)
    key = random_key(tl.load(seeds + table_row), tl.load(seq_lens + row))

    part = tl.program_id(1) * BLOCK_PARTS + tl.arange(0, BLOCK_PARTS)
    token = part[:, None] * PART + tl.arange(0, PART)[None, :]
    x = load_logits(logits + row * row_stride, token, token < vocab_size)
    scaled = scale(x, tl.max(every_maximum, axis=0), temperature)
    score = scaled - tl.log(exponential(key, token))
    at = row * num_parts + part
    if FILTERED:
        score = tl.where(scaled >= tl.log(tl.load(min_ps + table_row)), score, -_INF)
        tl.store(masses + at, tl.sum(tl.exp(scaled), axis=1), mask=part < num_parts)
    best, index = tl.max(score, axis=1, return_indices=True, return_indices_tie_break_left=True)
    tl.store(scores + at, best, mask=part < num_parts)
    tl.store(winners + at, part * PART + index, mask=part < num_parts)


@triton.jit
def _finish_rows(
    tokens: tl.tensor,  # [S] int64
    output_token_ids: tl.tensor,
    output_finish: tl.tensor,
    table_token_ids: tl.tensor,
    num_computed_tokens: tl.tensor,
    maxima: tl.tensor,
    likeliest: tl.tensor,
    scores: tl.tensor,
    winners: tl.tensor,
    masses: tl.tensor,
    logits: tl.tensor,
    row_stride: tl.tensor,
    model_logits: tl.tensor,  # with ADJUSTED: what `logits` were before their adjustment
    model_row_stride: tl.tensor,
    vocab_size: tl.tensor,
    num_parts: tl.tensor,
    sample_flags: tl.tensor,
    seq_row: tl.tensor,
    seq_lens: tl.tensor,
    temperatures: tl.tensor,
    top_ks: tl.tensor,
    top_ps: tl.tensor,
    seeds: tl.tensor,
    end_ids: tl.tensor,
    max_lens: tl.tensor,
    max_model_len: tl.tensor,
    NUM_END_IDS: tl.constexpr,
    MAX_END_IDS: tl.constexpr,
    DRAWN: tl.constexpr,
    ADJUSTED: tl.constexpr,
    FILTERED: tl.constexpr,
    LOW_BITS: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
) -> None:
    """Grid (S). Chooses a sequence's token from the parts' winners, and writes it, its finish code and the tables."""
    row = tl.program_id(0).to(tl.int64)
    table_row = tl.load(seq_row + row).to(tl.int64)
    position = tl.load(seq_lens + row)  # position of the new token; 0 = padding
    temperature = tl.load(temperatures + table_row)
    own_maxima, own_logits = maxima + row * num_parts, logits + row * row_stride
    part = tl.arange(0, MAX_PARTS)
    is_part = part < num_parts
    part_maxima = tl.load(own_maxima + part, mask=is_part, other=-_INF)
    maximum, best = tl.max(part_maxima, axis=0, return_indices=True, return_indices_tie_break_left=True)
    token = tl.load(likeliest + row * num_parts + best)
    is_finite = (maximum > -_INF) & (maximum < _INF)
    if DRAWN:  # noqa: SIM102 - one is known to the compiler, the other is not
        if temperature > 0:
            part_scores = tl.load(scores + row * num_parts + part, mask=is_part, other=-_INF)
            _, best = tl.max(part_scores, axis=0, return_indices=True, return_indices_tie_break_left=True)
            token = tl.load(winners + row * num_parts + best)
            if FILTERED:
                top_k = tl.load(top_ks + table_row)
                top_p = tl.load(top_ps + table_row)
                if ((top_k > 0) | (top_p < 1)) & is_finite:
                    token = settle(
                        token,
                        top_k,
                        top_p,
                        tl.sum(tl.load(masses + row * num_parts + part, mask=is_part, other=0.0), axis=0),
                        maximum,
                        temperature,
                        random_key(tl.load(seeds + table_row), position),
                        part_maxima,
                        own_maxima,
                        own_logits,
                        vocab_size,
                        num_parts,
                        LOW_BITS,
                        MAX_PARTS,
                        PART,
                        BLOCK_PARTS,
                    )

    tl.store(tokens + row, token.to(tl.int64))
    is_sampled = (tl.load(sample_flags + row) != 0) & (position > 0)
    tl.store(table_token_ids + table_row * max_model_len + position, token, mask=is_sampled)
    tl.store(num_computed_tokens + table_row, position)  # for all sequences, sampled or not; the trash row stays at 0
    place = tl.arange(0, MAX_END_IDS)
    own_end_ids = tl.load(end_ids + table_row * NUM_END_IDS + place, mask=place < NUM_END_IDS, other=_NO_TOKEN)
    is_end = tl.max((own_end_ids == token).to(tl.int32), axis=0) > 0
    is_full = position + 1 >= tl.load(max_lens + table_row)
    finish = tl.where(is_end, _STOP, tl.where(is_full, _LENGTH, 0))
    finish = tl.where(is_finite, finish, _NOT_FINITE)
    if ADJUSTED:  # noqa: SIM102 - one is known to the compiler, the other is not
        if maximum == -_INF:  # without NaN and +inf, which the stage keeps
            own_maximum = _row_maximum(model_logits + row * model_row_stride, vocab_size, PART)
            finish = tl.where(own_maximum > -_INF, _EXCLUDED, finish)
    tl.store(output_finish + row, tl.where(is_sampled, finish, 0))
    tl.store(output_token_ids + row, tl.where(is_sampled & is_finite, token, _NO_TOKEN))


@triton.jit
def _row_maximum(logits: tl.tensor, vocab_size: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Return the largest logit of a row, as float32."""
    maximum = tl.full([], -_INF, tl.float32)
    for start in range(0, vocab_size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = tl.load(logits + token, mask=token < vocab_size, other=-_INF).to(tl.float32)
        maximum = tl.maximum(maximum, tl.max(x, axis=0))
    return maximum
