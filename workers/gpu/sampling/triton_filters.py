"""top_k and top_p for the sampler's kernels: one program a row, which is given the winner among all its tokens.

What the filters keep is closed upwards, so whether a token is kept is seen from how many are likelier and what their
mass is. The winner of the whole race is kept more often than not. Where it is not, nothing as likely or less is, and
the next candidate is the winner among the likelier ones: so the winner among the kept is met in the end. Whatever is
counted lies above a candidate, in the few blocks of a row whose maxima do. Only for top_p within top_k is a threshold
searched for: its share is of the mass of the top_k. min_p has applied in the race.
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
_LEAST_ORDER = tl.constexpr(-0x7F800000 - 1)  # of -inf


@triton.jit
def settle(
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
    """The winner of the race among the tokens of an order above `bound`, of which there is one."""
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
    """Whether one of the block's tokens is of an order above `bound`."""
    part = first_part + tl.arange(0, BLOCK_PARTS)
    block_maxima = tl.load(maxima + part, mask=part < num_parts, other=-_INF)
    return _order(tl.max(block_maxima, axis=0), LOW_BITS) > bound


@triton.jit
def load_logits(logits: tl.tensor, token: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """float32, -inf where masked or NaN."""
    x = tl.load(logits + token, mask=mask, other=-_INF).to(tl.float32)
    return tl.where(x == x, x, -_INF)


@triton.jit
def scale(x: tl.tensor, maximum: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """Logits over temperature, the likeliest at 0, so that no temperature, however small, can overflow it.

    Even if the largest logit is infinite nothing becomes NaN.
    """
    return (x - tl.maximum(tl.minimum(maximum, _FINITE), -_FINITE)) / temperature


@triton.jit
def _order(x: tl.tensor, LOW_BITS: tl.constexpr) -> tl.tensor:
    """int32 in the order of the float32 values, of which LOW_BITS are never used."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # + 0.0 turns -0.0 into 0.0
    return (bits ^ ((bits >> 31) & _INT32_MAX)) >> LOW_BITS
