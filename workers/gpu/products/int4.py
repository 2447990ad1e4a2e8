"""Weights in 4 bits, in groups of inputs: (number - zero) * scale, with a number of 0 to 15.

    weight  [N, K / 8] int32: column c of a row holds the numbers of the inputs c, K / 8 + c, 2 K / 8 + c to
            7 K / 8 + c, from the lowest bits on: eight planes. So a kernel that reads a run of columns needs eight runs
            of inputs, and moves no number from one thread to another.
    scale   [1 or 2, N, K / G]: the scale of each output and each group of G inputs, and then its zero point, in the
            dtype in which the checkpoint stores the scales. Without zero points, they are 8. The scales of an output
            lie together, so that a program finds most of them in its cache.

A product's scale with three dimensions means this format; one with fewer means fp8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

PLANES: Final = 8  # numbers in a column
MIDDLE: Final = 8  # the zero point of weights that store none
_GROUP_UNIT: Final = 32
_ROWS: Final = 1024  # that are packed at a time, because float32 takes eight times the memory of a weight


def scale_of(scales: torch.Tensor, zeros: torch.Tensor | None, values: torch.Tensor) -> torch.Tensor | None:
    """Return the scales [N, groups] and zero points [N, groups] int32 (None: 8) of weights as one tensor
    [1 or 2, N, groups].

    `values` [N, K] are the dequantised weights. Returns None if this format cannot hold such groups, or if the dtype of
    `values` is too narrow to tell the numbers by them.
    """
    limits = torch.finfo(values.dtype)
    if values.shape[1] % (scales.shape[1] * _GROUP_UNIT) or not scales.is_floating_point():
        return None
    if not bool((scales.abs() >= limits.tiny * limits.eps).all() & values.isfinite().all()):
        return None
    has_zeros = zeros is not None and bool((zeros != MIDDLE).any())
    parts = [scales, zeros.to(scales.dtype)] if has_zeros and zeros is not None else [scales]
    return torch.stack(parts)


def group_of(weight: torch.Tensor, scale: torch.Tensor | None) -> int:
    """The inputs of a group of a weight in this format; 0 for other formats."""
    return 0 if scale is None or scale.ndim != 3 else PLANES * weight.shape[1] // scale.shape[2]


def to_int4(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the weight [N, K / 8] int32 whose dequantised numbers, in any float dtype, are `values` [N, K].

    They are the numbers of the checkpoint: rounding to 16 bits moved a value by less than half of its scale, if the
    scale is at least the smallest number of that dtype, in float16 2^-24.
    """
    parts = zip(torch.split(values, _ROWS), torch.split(scale.float(), _ROWS, 1), strict=True)
    return torch.cat([_pack(own, own_scale) for own, own_scale in parts])


def _pack(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    num_rows, num_inputs = values.shape
    factors, zeros = _of_rows(scale)
    numbers = (values.float().view(num_rows, scale.shape[2], -1) / factors).round_() + zeros
    planes = numbers.clamp_(0, 15).to(torch.int32).view(num_rows, PLANES, num_inputs // PLANES)
    words = planes[:, 0].clone()
    for plane in range(1, PLANES):
        words |= planes[:, plane] << 4 * plane
    return words


def from_int4(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a weight [N, K / 8] in `dtype`, [N, K], computed in float32."""
    num_rows, num_columns = weight.shape
    factors, zeros = _of_rows(scale.float())
    full = torch.empty(num_rows, PLANES, num_columns, device=weight.device)
    for plane in range(PLANES):
        full[:, plane] = (weight >> 4 * plane) & 15
    full.view(num_rows, scale.shape[2], -1).sub_(zeros).mul_(factors)
    return full.view(num_rows, PLANES * num_columns).to(dtype)


def _of_rows(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
    """The factors and zero points, each [N, groups, 1]."""
    return scale[0, ..., None], scale[1, ..., None] if len(scale) == 2 else float(MIDDLE)


def are_alike(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    """Whether two weights with these scales, in this format, in fp8 or in 16 bits (None), can become one by outputs."""
    if first is None or second is None:
        return first is second
    return (first.ndim, first.shape[2:], first.dtype) == (second.ndim, second.shape[2:], second.dtype)


def join_scales(scales: Sequence[torch.Tensor]) -> torch.Tensor:
    """Join the scales of weights by outputs; all of them are alike, and of blocks only the last may be smaller."""
    if scales[0].ndim < 3:
        return torch.cat(list(scales))
    if any(len(each) == 2 for each in scales):
        scales = [each if len(each) == 2 else torch.cat([each, torch.full_like(each, MIDDLE)]) for each in scales]
    return torch.cat(list(scales), 1)
