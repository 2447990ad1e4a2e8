"""Counter-based random numbers, without a state: each is a hash of (seed, position, vocabulary index).

So the draws of a request depend only on these three: not on its batch, its row, the order of steps, the depth of the
ring, or a restart. Salmon et al. (2011, "Parallel random numbers: as easy as 1, 2, 3") describe such generators. All
arithmetic wraps, and every device gives the same bits.
"""

from __future__ import annotations

from typing import Final

import torch

_MIX_A: Final = 0xBF58476D1CE4E5B9 - 2**64  # the constants of splitmix64 (Steele, Lea and Flood, 2014), as int64
_MIX_B: Final = 0x94D049BB133111EB - 2**64
_GOLDEN_64: Final = 0x9E3779B97F4A7C15 - 2**64
_FMIX_A: Final = 0x85EBCA6B - 2**32  # the finaliser of murmur3 (Appleby), as int32
_FMIX_B: Final = 0xC2B2AE35 - 2**32
_GOLDEN_32: Final = 0x9E3779B1 - 2**32
_BELOW_ONE: Final = 1 - 2.0**-24  # the largest float32 below 1


def mix64(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser, a bijection of int64."""
    x = (x ^ _shift_right(x, 30, 64)) * _MIX_A
    x = (x ^ _shift_right(x, 27, 64)) * _MIX_B
    return x ^ _shift_right(x, 31, 64)


def uniform(seed: torch.Tensor, position: torch.Tensor, num_draws: int) -> torch.Tensor:
    """[S, num_draws] float32 in the open interval (0, 1); `seed` and `position` are [S] int64.

    Each (seed, position) is mixed into a 64-bit key, and draw i hashes i with both halves of the key. Small values are
    2**-31 apart, so that `-log(1 - u)` has a fine resolution near 0.
    """
    key = mix64(mix64(seed + _GOLDEN_64) + position * _GOLDEN_64)
    low = key.to(torch.int32)  # wraps: the lower half
    high = _shift_right(key, 32, 64).to(torch.int32)
    draws = torch.arange(num_draws, dtype=torch.int32, device=seed.device) * _GOLDEN_32
    bits = _fmix32_(draws + low[:, None])
    bits = _fmix32_(bits.add_(high[:, None]))
    return bits.bitwise_and_(0x7FFFFFFF).to(torch.float32).add_(0.5).mul_(2.0**-31).clamp_(max=_BELOW_ONE)


def exponential(seed: torch.Tensor, position: torch.Tensor, num_draws: int) -> torch.Tensor:
    """Like `uniform`, but exponentially distributed with mean 1. Values are finite, above 0, and fine-grained near
    0."""
    return uniform(seed, position, num_draws).neg_().log1p_().neg_()


def _fmix32_(x: torch.Tensor) -> torch.Tensor:
    """murmur3's finaliser, a bijection of int32, in place."""
    x ^= _shift_right(x, 16, 32)
    x *= _FMIX_A
    x ^= _shift_right(x, 13, 32)
    x *= _FMIX_B
    x ^= _shift_right(x, 16, 32)
    return x


def _shift_right(x: torch.Tensor, count: int, width: int) -> torch.Tensor:
    """Logical shift of signed integers of `width` bits."""
    return (x >> count) & ((1 << (width - count)) - 1)
