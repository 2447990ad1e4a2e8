"""The random numbers of `random_bits`, computed inside Triton kernels. The uniforms are the same, bit for bit."""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

_MIX_A = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_B = tl.constexpr(0x94D049BB133111EB)
_GOLDEN_64 = tl.constexpr(0x9E3779B97F4A7C15)
_FMIX_A = tl.constexpr(0x85EBCA6B)
_FMIX_B = tl.constexpr(0xC2B2AE35)
_GOLDEN_32 = tl.constexpr(0x9E3779B1)
_STEP = tl.constexpr(2.0**-31)
_BELOW_ONE = tl.constexpr(1 - 2.0**-24)
_SERIES_END = tl.constexpr(0.125)


@triton.jit
def random_key(seed: tl.tensor, position: tl.tensor) -> tl.tensor:
    """Return the uint64 key with which every draw of this seed and position is hashed."""
    return _mix64(_mix64(seed.to(tl.uint64) + _GOLDEN_64) + position.to(tl.uint64) * _GOLDEN_64)


@triton.jit
def uniform(key: tl.tensor, index: tl.tensor) -> tl.tensor:
    """Return float32 in the open interval (0, 1), of the shape of `index` (int32)."""
    bits = _fmix32(index.to(tl.uint32) * _GOLDEN_32 + key.to(tl.uint32))
    bits = _fmix32(bits + (key >> 32).to(tl.uint32))
    return tl.minimum(((bits & 0x7FFFFFFF).to(tl.int32).to(tl.float32) + 0.5) * _STEP, _BELOW_ONE)


@triton.jit
def exponential(key: tl.tensor, index: tl.tensor) -> tl.tensor:
    """Like `uniform`, but exponentially distributed with mean 1."""
    return exponential_of(uniform(key, index))


@triton.jit
def exponential_of(u: tl.tensor) -> tl.tensor:
    """Return -log1p(-u), with a relative error of at most 5e-7 for every u.

    Winners of a race have a small u, and 1 - u keeps few bits of it. So a small u uses the series u + u**2/2 + ... +
    u**7/7.
    """
    series = u * (1 / 7) + 1 / 6
    series = u * series + 1 / 5
    series = u * series + 1 / 4
    series = u * series + 1 / 3
    series = u * series + 1 / 2
    return tl.where(u < _SERIES_END, u + u * u * series, -tl.log(1.0 - u))


@triton.jit
def _mix64(x: tl.tensor) -> tl.tensor:
    x = (x ^ (x >> 30)) * _MIX_A
    x = (x ^ (x >> 27)) * _MIX_B
    return x ^ (x >> 31)


@triton.jit
def _fmix32(x: tl.tensor) -> tl.tensor:
    x = (x ^ (x >> 16)) * _FMIX_A
    x = (x ^ (x >> 13)) * _FMIX_B
    return x ^ (x >> 16)
