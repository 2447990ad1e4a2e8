"""Weights in 8 bits: float8 e4m3, with float32 scales.

    weight  [N, K]
    scale   [N]: one for each output, or [ceil(N / 128), K / 128]: one for each block of 128 outputs and 128 inputs. The
            last block of outputs may be smaller.

A product's scale with one or two dimensions means this format; one with three means 4 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import torch

from workers.gpu.e4m3 import E4M3, E4M3_MAX

SMALLEST_SCALE: Final = 2.0**-100  # of a channel of zeros: any positive scale serves
BLOCK: Final = 128  # outputs and inputs of a block
_ROWS: Final = 8 * BLOCK  # that are made wide at a time, because float32 takes four times the memory of a weight


def has_blocks(scale: torch.Tensor | None) -> bool:
    """Whether these are the scales of blocks."""
    return scale is not None and scale.ndim == 2


def to_fp8(values: torch.Tensor, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `values` [N, K] in fp8 and the float32 scale, such that values ~ fp8 * scale.

    Without `scale`, each row gets one, [N], which makes its largest number 448, the largest of the format, so nothing
    overflows. NaN and infinity make the row's scale NaN or infinite: they do not vanish.

    With `scale`, of rows or of blocks, products of fp8 numbers and this scale give the same fp8 numbers again, even if
    they were rounded to 16 bits in between. In float16 this holds for scales above 3.1e-5 only, because it stores
    smaller products with fewer bits.
    """
    if scale is None:
        scale = (values.abs().amax(1).float() / E4M3_MAX).clamp(min=SMALLEST_SCALE)
    result = torch.empty(values.shape, dtype=E4M3, device=values.device)
    for rounded, part, factor in zip(*_rows_of(result, values), _factors(scale, values), strict=True):
        rounded.copy_(part.float() / factor)
    return result, scale


def from_fp8(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return weights [N, K] of fp8 and their scales in `dtype`."""
    result = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for wide, part, factor in zip(*_rows_of(result, weight), _factors(scale, weight), strict=True):
        wide.copy_(part.float() * factor)
    return result


def _rows_of(*tensors: torch.Tensor) -> list[Sequence[torch.Tensor]]:
    """Views of _ROWS rows of each tensor at a time."""
    return [torch.split(each, _ROWS) for each in tensors]


def _factors(scale: torch.Tensor, weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """The scales of _ROWS rows of a weight at a time: [rows, 1], or [rows, K] of blocks."""
    if not has_blocks(scale):
        yield from torch.split(scale[:, None], _ROWS)
        return
    num_left = len(weight)
    for part in torch.split(scale, _ROWS // BLOCK):
        yield part.repeat_interleave(BLOCK, 0)[:num_left].repeat_interleave(BLOCK, 1)
        num_left -= _ROWS
