"""top_k and top_p for the sampler's kernels. One program per row starts from the winner of the race over all tokens.

If the filters keep a token, they keep every likelier token. So the number and the mass of the likelier tokens decide
whether a token is kept. The filters usually keep the winner of the whole race:

    candidate = winner of all  ->  kept?  -- yes -> done
         ^                           | no: no token as likely or less is kept
         '-- winner of the likelier tokens <-'

The likeliest token is always kept, so this ends, and it ends with the winner among the kept tokens. Only blocks of a
row with a maximum above the candidate are read. top_p together with top_k first needs the threshold of top_k, because
top_p is a share of the mass of the top_k tokens. The race has already applied min_p.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from workers.gpu.sampling.triton_random import exponential

_INF = tl.constexpr(float("inf"))
_FINITE = tl.constexpr(torch.finfo(torch.float32).max)
_INT32_MAX = tl.constexpr(2**31 - 1)
_LEAST_ORDER = tl.constexpr(-0x7F800000 - 1)  # the order of -inf


@triton.jit
def settle(
    token: tl.tensor,  # the winner of the race over all tokens
    top_k: tl.tensor,
    top_p: tl.tensor,
    total: tl.tensor,  # mass of all tokens, as p / (the likeliest token's p)
    maximum: tl.tensor,
    temperature: tl.tensor,
    key: tl.tensor,
    part_maxima: tl.tensor,  # [MAX_PARTS], the values that `maxima` points to
    maxima: tl.tensor,
    logits: tl.tensor,
    vocab_size: tl.tensor,
    num_parts: tl.tensor,
    LOW_BITS: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
) -> tl.tensor:
    """Return the winner of the race among the tokens that top_k and top_p keep.

    Each round moves to a likelier token. The loop ends, because the likeliest token is kept.
    """
    floor = tl.full([], _LEAST_ORDER >> LOW_BITS, tl.int32)  # no token of a lower order is kept
    if top_k > 0:
        # At least k parts have a token at or above the k-th largest maximum. With fewer than k parts that is -inf.
        ordered = tl.sort(part_maxima, descending=True)
        place = tl.arange(0, MAX_PARTS)
        floor = _order(tl.max(tl.where(place == top_k - 1, ordered, -_INF), axis=0), LOW_BITS)
    enough = tl.full([], _INF, tl.float32)  # top_p drops a token with at least this mass above it
    if top_p < 1:
        if top_k > 0:
            floor, total = _top_k(
                top_k, floor, _order(maximum, LOW_BITS), maximum, temperature, maxima, logits, vocab_size, num_parts,
                LOW_BITS, PART, BLOCK_PARTS,
            )  # fmt: skip
        enough = top_p * total
    wanted = tl.where(top_k > 0, top_k, _INT32_MAX)
    order = _order(load_logits(logits, token, token >= 0), LOW_BITS)
    while _is_dropped(
        order, floor, wanted, enough, maximum, temperature, maxima, logits, vocab_size, num_parts,
        LOW_BITS, PART, BLOCK_PARTS,
    ):  # fmt: skip
        token = _winner_above(
            tl.maximum(order, floor - 1), key, maximum, temperature, maxima, logits, vocab_size, num_parts,
            LOW_BITS, PART, BLOCK_PARTS,
        )  # fmt: skip
        order = _order(load_logits(logits, token, token >= 0), LOW_BITS)
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
    """Return whether a token of this order is below `floor`, or has `wanted` tokens or a mass of `enough` above it."""
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
    """Return the lowest order, within low..high, among the top_k likeliest tokens and their equals, and their mass."""
    while low < high:  # fewer than top_k tokens are above `high`; the k-th lies in low..high
        middle = (low.to(tl.int64) + (high.to(tl.int64) - low) // 2).to(tl.int32)
        count, _ = _above(
            middle, maximum, temperature, maxima, logits, vocab_size, num_parts, LOW_BITS, PART, BLOCK_PARTS
        )
        low = tl.where(count >= top_k, middle + 1, low)
        high = tl.where(count > top_k, high, middle)  # exactly k are above: done, low > high
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
    """Return the number of tokens of an order above `bound`, and their mass."""
    counts = tl.zeros([BLOCK_PARTS * PART], tl.int32)
    masses = tl.zeros([BLOCK_PARTS * PART], tl.float32)
    for first_part in range(0, num_parts, BLOCK_PARTS):
        if _reaches(first_part, bound, maxima, num_parts, LOW_BITS, BLOCK_PARTS):
            token = first_part * PART + tl.arange(0, BLOCK_PARTS * PART)
            x = load_logits(logits, token, token < vocab_size)
            is_above = (token < vocab_size) & (_order(x, LOW_BITS) > bound)
            counts += is_above.to(tl.int32)
            masses += tl.where(is_above, tl.exp(scale(x, maximum, temperature)), 0.0)
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
    """Return the winner of the race among the tokens of an order above `bound`. At least one must exist."""
    best = tl.full([], -_INF, tl.float32)
    winner = tl.full([], 0, tl.int32)
    for first_part in range(0, num_parts, BLOCK_PARTS):
        if _reaches(first_part, bound, maxima, num_parts, LOW_BITS, BLOCK_PARTS):
            token = first_part * PART + tl.arange(0, BLOCK_PARTS * PART)
            x = load_logits(logits, token, token < vocab_size)
            score = scale(x, maximum, temperature) - tl.log(exponential(key, token))
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
    """Return whether one of the block's tokens is of an order above `bound`."""
    part = first_part + tl.arange(0, BLOCK_PARTS)
    block_maxima = tl.load(maxima + part, mask=part < num_parts, other=-_INF)
    return _order(tl.max(block_maxima, axis=0), LOW_BITS) > bound


@triton.jit
def load_logits(logits: tl.tensor, token: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Load logits as float32; -inf where masked or NaN."""
    x = tl.load(logits + token, mask=mask, other=-_INF).to(tl.float32)
    return tl.where(x == x, x, -_INF)


@triton.jit
def scale(x: tl.tensor, maximum: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """Return logits divided by temperature, with the likeliest at 0, so that even the smallest temperature cannot
    overflow it.

    The result is not NaN even if the largest logit is infinite.
    """
    return (x - tl.maximum(tl.minimum(maximum, _FINITE), -_FINITE)) / temperature


@triton.jit
def _order(x: tl.tensor, LOW_BITS: tl.constexpr) -> tl.tensor:
    """Map float32 values to int32 of the same order. The values do not use their LOW_BITS lowest bits."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # + 0.0 turns -0.0 into 0.0
    return (bits ^ ((bits >> 31) & _INT32_MAX)) >> LOW_BITS
