"""The sampler's kernels on CUDA: `sampler.sample` in two to three launches, with a pass or two over the logits.

    maxima of parts | race of parts (unless all is greedy) | one program a row: filters, and the row's end

Rows are cut into parts, so that few sequences keep the whole device busy. No threshold is searched for: what top_k and
top_p keep is closed upwards, so whether a token is kept is seen from how many are likelier and what their mass is. The
winner of the race of all tokens is kept more often than not. Where it is not, no token that is as likely or less is,
and the next candidate is the winner among the likelier ones: the winner among the kept is met in the end. Whatever is
counted lies above a candidate, in the few blocks of a row whose maxima do.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl

from ipc.records import MAX_END_IDS, NO_TOKEN, FinishCode, SamplerVariant
from workers.gpu.batch import StepBatch
from workers.gpu.tables import RowTables
from workers.gpu.triton_random import exponential, random_key

_PART: Final = 1024  # elements of a row that have a maximum of their own
_BLOCK_PARTS: Final = 4  # that a program of the first kernels reads, and a program of the last at a time
_LOW_BITS: Final = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}  # of a float32, that no such value uses

_INF = tl.constexpr(float("inf"))
_FINITE = tl.constexpr(torch.finfo(torch.float32).max)
_INT32_MAX = tl.constexpr(2**31 - 1)
_LEAST_ORDER = tl.constexpr(-0x7F800000 - 1)  # of -inf
_NO_TOKEN = tl.constexpr(NO_TOKEN)
_STOP = tl.constexpr(int(FinishCode.STOP))
_LENGTH = tl.constexpr(int(FinishCode.LENGTH))


def sample(
    variant: SamplerVariant,
    logits: torch.Tensor,
    batch: StepBatch,
    sample_flags: torch.Tensor,
    tables: RowTables,
    outputs: Any,
) -> torch.Tensor:
    """What `sampler.sample` does, but for log-probabilities. Returns every row's token, [S] int64.

    `logits` are bfloat16, float16 or float32, those of a row side by side. A NaN counts as -inf: a token always lies in
    the vocabulary. Looks at nothing on the host, so that it can be captured.
    """
    num_seqs, vocab_size = logits.shape
    assert logits.stride(1) == 1, "the logits of a row lie side by side"
    num_parts = triton.cdiv(vocab_size, _PART)
    parts_shape = {"PART": _PART, "BLOCK_PARTS": _BLOCK_PARTS}
    grid = (num_seqs, triton.cdiv(num_parts, _BLOCK_PARTS))

    def by_part(dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(num_seqs, num_parts, dtype=dtype, device=logits.device)

    drawn, filtered = variant != SamplerVariant.GREEDY, variant == SamplerVariant.FILTERED
    maxima, likeliest = by_part(torch.float32), by_part(torch.int32)
    _maxima_of_parts[grid](maxima, likeliest, logits, logits.stride(0), vocab_size, num_parts, **parts_shape)
    scores, winners, masses = maxima, likeliest, maxima  # of no use without a race
    if drawn:
        scores, winners, masses = by_part(torch.float32), by_part(torch.int32), by_part(torch.float32)
        _race_of_parts[grid](
            scores,
            winners,
            masses,
            maxima,
            logits,
            logits.stride(0),
            vocab_size,
            num_parts,
            batch.seq_row,
            batch.seq_lens,
            tables.temperature,
            tables.min_p,
            tables.seed,
            FILTERED=filtered,
            MAX_PARTS=triton.next_power_of_2(num_parts),
            **parts_shape,
            num_warps=8,
        )
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
    """Grid (S, blocks of a row): each part's largest logit, [S, parts] float32, and the first token that has it."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1) * BLOCK_PARTS + tl.arange(0, BLOCK_PARTS)
    token = part[:, None] * PART + tl.arange(0, PART)[None, :]
    x = _load_logits(logits + row * row_stride, token, token < vocab_size)
    # What lies beyond the row is the last of equals, and never chosen.
    maximum, index = tl.max(x, axis=1, return_indices=True, return_indices_tie_break_left=True)
    at = row * num_parts + part
    tl.store(maxima + at, maximum, mask=part < num_parts)
    tl.store(likeliest + at, part * PART + index, mask=part < num_parts)


@triton.jit
def _race_of_parts(
    scores: tl.tensor,  # [S, parts] float32: the best of each part
    winners: tl.tensor,  # [S, parts] int32: whose it is
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
    """Grid (S, blocks of a row): the race p / e, e ~ Exp(1), in logarithms. min_p applies here already."""
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
    x = _load_logits(logits + row * row_stride, token, token < vocab_size)
    scaled = _scale(x, tl.max(every_maximum, axis=0), temperature)
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
    FILTERED: tl.constexpr,
    LOW_BITS: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
) -> None:
    """Grid (S): a row's token from its parts, and what follows from it."""
    row = tl.program_id(0).to(tl.int64)
    table_row = tl.load(seq_row + row).to(tl.int64)
    position = tl.load(seq_lens + row)  # of the new token; 0 = padding
    temperature = tl.load(temperatures + table_row)
    own_maxima, own_logits = maxima + row * num_parts, logits + row * row_stride
    part = tl.arange(0, MAX_PARTS)
    is_part = part < num_parts
    part_maxima = tl.load(own_maxima + part, mask=is_part, other=-_INF)
    maximum, best = tl.max(part_maxima, axis=0, return_indices=True, return_indices_tie_break_left=True)
    token = tl.load(likeliest + row * num_parts + best)
    if DRAWN:  # noqa: SIM102 - one is known to the compiler, the other is not
        if temperature > 0:
            part_scores = tl.load(scores + row * num_parts + part, mask=is_part, other=-_INF)
            _, best = tl.max(part_scores, axis=0, return_indices=True, return_indices_tie_break_left=True)
            token = tl.load(winners + row * num_parts + best)
            if FILTERED:
                top_k = tl.load(top_ks + table_row)
                top_p = tl.load(top_ps + table_row)
                if (top_k > 0) | (top_p < 1):
                    token = _settle(
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
    tl.store(num_computed_tokens + table_row, position)  # sampled or not; the trash row stays at 0
    place = tl.arange(0, MAX_END_IDS)
    own_end_ids = tl.load(end_ids + table_row * NUM_END_IDS + place, mask=place < NUM_END_IDS, other=_NO_TOKEN)
    is_end = tl.max((own_end_ids == token).to(tl.int32), axis=0) > 0
    is_full = position + 1 >= tl.load(max_lens + table_row)
    finish = tl.where(is_end, _STOP, tl.where(is_full, _LENGTH, 0))
    tl.store(output_finish + row, tl.where(is_sampled, finish, 0))
    tl.store(output_token_ids + row, tl.where(is_sampled, token, _NO_TOKEN))


@triton.jit
def _settle(
    token: tl.tensor,  # the winner of all
    top_k: tl.tensor,
    top_p: tl.tensor,
    total: tl.tensor,  # mass of all
    maximum: tl.tensor,
    temperature: tl.tensor,
    key: tl.tensor,
    part_maxima: tl.tensor,  # [MAX_PARTS], and where they are stored
    maxima: tl.tensor,
    logits: tl.tensor,
    vocab_size: tl.tensor,
    num_parts: tl.tensor,
    LOW_BITS: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
) -> tl.tensor:
    """The winner among what top_k and top_p keep.

    Every round moves to a likelier token, and the likeliest, which nothing is above, is kept: this ends.
    """
    floor = tl.full([], _LEAST_ORDER >> LOW_BITS, tl.int32)  # no token of a lower order is kept
    if top_k > 0:
        # As many parts have a token of at least their k-th largest maximum; of fewer parts that is -inf.
        ordered = tl.sort(part_maxima, descending=True)
        place = tl.arange(0, MAX_PARTS)
        floor = _order(tl.max(tl.where(place == top_k - 1, ordered, -_INF), axis=0), LOW_BITS)
    enough = tl.full([], _INF, tl.float32)  # the mass above a token from which on top_p drops it
    if top_p < 1:
        if top_k > 0:
            floor, total = _top_k(
                top_k, floor, _order(maximum, LOW_BITS), maximum, temperature, maxima, logits, vocab_size, num_parts,
                LOW_BITS, PART, BLOCK_PARTS,
            )  # fmt: skip
        enough = top_p * total
    wanted = tl.where(top_k > 0, top_k, _INT32_MAX)
    order = _order(_load_logits(logits, token, token >= 0), LOW_BITS)
    while _is_dropped(
        order, floor, wanted, enough, maximum, temperature, maxima, logits, vocab_size, num_parts,
        LOW_BITS, PART, BLOCK_PARTS,
    ):  # fmt: skip
        token = _winner_above(
            tl.maximum(order, floor - 1), key, maximum, temperature, maxima, logits, vocab_size, num_parts,
            LOW_BITS, PART, BLOCK_PARTS,
        )  # fmt: skip
        order = _order(_load_logits(logits, token, token >= 0), LOW_BITS)
    return token


@triton.jit
def _is_dropped(
    order: tl.tensor,
    floor: tl.tensor,
    wanted: tl.tensor,
    enough: tl.tensor,
    maximum: tl.tensor,
    temperature: tl.tensor,
    maxima: tl.tensor,
    logits: tl.tensor,
    vocab_size: tl.tensor,
    num_parts: tl.tensor,
    LOW_BITS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
) -> tl.tensor:
    """Whether a token of this order is below `floor`, or has `wanted` tokens or a mass of `enough` above it."""
    is_dropped = order < floor
    if order >= floor:
        count, mass = _above(
            order, maximum, temperature, maxima, logits, vocab_size, num_parts, LOW_BITS, PART, BLOCK_PARTS
        )
        is_dropped = (count > 0) & ((count >= wanted) | (mass >= enough))
    return is_dropped


@triton.jit
def _top_k(
    top_k: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    maximum: tl.tensor,
    temperature: tl.tensor,
    maxima: tl.tensor,
    logits: tl.tensor,
    vocab_size: tl.tensor,
    num_parts: tl.tensor,
    LOW_BITS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
) -> tl.tensor:
    """The lowest order among the top_k likeliest tokens and their equals, which lies in low..high, and their mass."""
    while low < high:  # fewer than top_k are above `high`, and it or less is the k-th
        middle = (low.to(tl.int64) + (high.to(tl.int64) - low) // 2).to(tl.int32)
        count, _ = _above(
            middle, maximum, temperature, maxima, logits, vocab_size, num_parts, LOW_BITS, PART, BLOCK_PARTS
        )
        low = tl.where(count >= top_k, middle + 1, low)
        high = tl.where(count > top_k, high, middle)  # exactly k: these they are, and low is above high
    _, mass = _above(low - 1, maximum, temperature, maxima, logits, vocab_size, num_parts, LOW_BITS, PART, BLOCK_PARTS)
    return low, mass


@triton.jit
def _above(
    bound: tl.tensor,
    maximum: tl.tensor,
    temperature: tl.tensor,
    maxima: tl.tensor,
    logits: tl.tensor,
    vocab_size: tl.tensor,
    num_parts: tl.tensor,
    LOW_BITS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
) -> tl.tensor:
    """How many tokens are of an order above `bound`, and their mass."""
    counts = tl.zeros([BLOCK_PARTS * PART], tl.int32)
    masses = tl.zeros([BLOCK_PARTS * PART], tl.float32)
    for first_part in range(0, num_parts, BLOCK_PARTS):
        if _reaches(first_part, bound, maxima, num_parts, LOW_BITS, BLOCK_PARTS):
            token = first_part * PART + tl.arange(0, BLOCK_PARTS * PART)
            x = _load_logits(logits, token, token < vocab_size)
            is_above = (token < vocab_size) & (_order(x, LOW_BITS) > bound)
            counts += is_above.to(tl.int32)
            masses += tl.where(is_above, tl.exp(_scale(x, maximum, temperature)), 0.0)
    return tl.sum(counts, axis=0), tl.sum(masses, axis=0)


@triton.jit
def _winner_above(
    bound: tl.tensor,
    key: tl.tensor,
    maximum: tl.tensor,
    temperature: tl.tensor,
    maxima: tl.tensor,
    logits: tl.tensor,
    vocab_size: tl.tensor,
    num_parts: tl.tensor,
    LOW_BITS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
) -> tl.tensor:
    """The winner of the race among the tokens of an order above `bound`, of which there is one."""
    best = tl.full([], -_INF, tl.float32)
    winner = tl.full([], 0, tl.int32)
    for first_part in range(0, num_parts, BLOCK_PARTS):
        if _reaches(first_part, bound, maxima, num_parts, LOW_BITS, BLOCK_PARTS):
            token = first_part * PART + tl.arange(0, BLOCK_PARTS * PART)
            x = _load_logits(logits, token, token < vocab_size)
            score = _scale(x, maximum, temperature) - tl.log(exponential(key, token))
            score = tl.where(_order(x, LOW_BITS) > bound, score, -_INF)
            own_best, index = tl.max(score, axis=0, return_indices=True, return_indices_tie_break_left=True)
            winner = tl.where(own_best > best, first_part * PART + index, winner)
            best = tl.maximum(own_best, best)
    return winner


@triton.jit
def _reaches(
    first_part: tl.tensor,
    bound: tl.tensor,
    maxima: tl.tensor,
    num_parts: tl.tensor,
    LOW_BITS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
) -> tl.tensor:
    """Whether one of the block's tokens is of an order above `bound`."""
    part = first_part + tl.arange(0, BLOCK_PARTS)
    block_maxima = tl.load(maxima + part, mask=part < num_parts, other=-_INF)
    return _order(tl.max(block_maxima, axis=0), LOW_BITS) > bound


@triton.jit
def _load_logits(logits: tl.tensor, token: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """float32, -inf where masked or NaN."""
    x = tl.load(logits + token, mask=mask, other=-_INF).to(tl.float32)
    return tl.where(x == x, x, -_INF)


@triton.jit
def _scale(x: tl.tensor, maximum: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """Logits over temperature, the likeliest at 0, so that no temperature, however small, can overflow it.

    Even if the largest logit is infinite nothing becomes NaN.
    """
    return (x - tl.maximum(tl.minimum(maximum, _FINITE), -_FINITE)) / temperature


@triton.jit
def _order(x: tl.tensor, LOW_BITS: tl.constexpr) -> tl.tensor:
    """int32 in the order of the float32 values, of which LOW_BITS are never used."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # + 0.0 turns -0.0 into 0.0
    return (bits ^ ((bits >> 31) & _INT32_MAX)) >> LOW_BITS
