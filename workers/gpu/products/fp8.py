"""Weights in 8 bits: float8 e4m3, one float32 scale for each output channel."""

from __future__ import annotations

from typing import Final

import torch

from workers.gpu.e4m3 import E4M3, E4M3_MAX

SMALLEST_SCALE: Final = 2.0**-100  # of a channel of zeros: any positive scale serves


def to_fp8(values: torch.Tensor, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `values` [N, K] in fp8 and the float32 scale [N] of each row, so that values ~ fp8 * scale.

    Without `scale`, a row's scale makes its largest number 448, the largest of the format, so nothing overflows. NaN
    and infinity make the row's scale NaN or infinite: they do not vanish.

    With `scale`, products of fp8 numbers and this scale give the same fp8 numbers again, even if they were rounded to
    16 bits in between. In float16 this holds for scales above 3.1e-5 only, because it stores smaller products with
    fewer bits.
    """
    if scale is None:
        scale = (values.abs().amax(1).float() / E4M3_MAX).clamp(min=SMALLEST_SCALE)
    return (values.float() / scale[:, None]).to(E4M3), scale


def from_fp8(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return weights [N, K] of fp8 and their scales [N] in `dtype`."""
    return (weight.float() * scale[:, None]).to(dtype)
