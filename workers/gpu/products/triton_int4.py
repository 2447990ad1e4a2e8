"""Weights in 4 bits inside the kernels: their numbers, their products with rows, and whole weights in 16 bits."""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from workers.gpu.products.int4 import PLANES, group_of

_ROWS, _COLUMNS = 16, 128  # of a weight that a program makes wide


@triton.jit
def plane_of(
    tile: tl.tensor, scale_at: tl.tensor, zero_at: tl.tensor, hidden: tl.tensor, J: tl.constexpr, ZEROS: tl.constexpr
) -> tl.tensor:
    """Return plane J of columns, as float32 numbers less their zero points, and their scales, [N, 1].

    `tile` [N, C] int32 is of one group; `scale_at` and `zero_at` [N] point to its scales and zero points. They have one
    dimension, because a thread would read a column once for each of its numbers. `hidden` is 0; see `add_planes`.

    A number in the lowest bits of 2^23 as float32 is 2^23 + number. One that lies PLACE bits higher, in a float32 of as
    much smaller an exponent, is 2^(23 - PLACE) + number. So setting the exponent converts it, and a subtraction, which
    is exact, takes the rest and the zero point away.
    """
    PLACE: tl.constexpr = 4 * J if J < 5 else 4 * J - 12
    word = tile if J < 5 else tile >> 12
    number = (word & (15 << PLACE)) | (((150 - PLACE) << 23) + hidden)
    lowest = float(1 << (23 - PLACE)) + 8.0
    if ZEROS:
        lowest = (float(1 << (23 - PLACE)) + tl.load(zero_at).to(tl.float32))[:, None]
    return number.to(tl.float32, bitcast=True) - lowest, tl.load(scale_at).to(tl.float32)[:, None]


@triton.jit
def add_planes(
    total: tl.tensor,  # [N, C / RUN] float32, of the first row
    total2: tl.tensor,  # of the second
    tile: tl.tensor,  # [N, C] int32
    x_at: tl.tensor,  # [C]: at the inputs of the first plane
    x_stride: tl.tensor,
    scale_at: tl.tensor,  # [N]: at the first group
    zeros_after: tl.tensor,  # numbers from a scale to its zero point
    num_columns: tl.tensor,  # of the weight
    begin: tl.tensor,  # the column of the tile
    RUN: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    TWO_ROWS: tl.constexpr,
) -> tl.tensor:
    """Add the products of weights with one row of x or two. RUN neighbours make one sum.

    The compiler does not know that `hidden` is 0. So it keeps the exponents in registers, and one instruction cuts a
    number out and sets its exponent: an instruction takes one constant only.
    """
    SHAPE: tl.constexpr = [tile.shape[0], tile.shape[1] // RUN, RUN]
    hidden = num_columns >> 30
    for j in tl.static_range(8):
        own_scale_at = scale_at + ((j * num_columns + begin).to(tl.uint32) // GROUP).to(tl.int32)
        numbers, factor = plane_of(tile, own_scale_at, own_scale_at + zeros_after, hidden, j, ZEROS)
        row = tl.load(x_at + j * num_columns).to(tl.float32)
        total += tl.sum(tl.reshape(numbers * row[None, :], SHAPE), 2) * factor
        if TWO_ROWS:
            row2 = tl.load(x_at + x_stride + j * num_columns).to(tl.float32)
            total2 += tl.sum(tl.reshape(numbers * row2[None, :], SHAPE), 2) * factor
    return total, total2


@triton.jit
def dot_planes(
    total: tl.tensor,  # [N, ROWS] float32
    tile: tl.tensor,  # [N, C] int32
    x_at: tl.tensor,  # [C, ROWS]: at the inputs of the first plane
    is_own: tl.tensor,  # [1, ROWS]: whether the row exists
    scale_at: tl.tensor,  # as in `add_planes`, and all below
    zeros_after: tl.tensor,
    num_columns: tl.tensor,
    begin: tl.tensor,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
) -> tl.tensor:
    """Add the products of weights with rows of x, on the matrix units.

    Nothing is `hidden` here: with it, the compiler would move the numbers between threads after their conversion.
    """
    for j in tl.static_range(8):
        own_scale_at = scale_at + ((j * num_columns + begin).to(tl.uint32) // GROUP).to(tl.int32)
        numbers, factor = plane_of(tile, own_scale_at, own_scale_at + zeros_after, 0, j, ZEROS)
        x_tile = tl.load(x_at + j * num_columns, mask=is_own, other=0.0)
        total += tl.dot(numbers.to(x_tile.dtype), x_tile, input_precision="ieee") * factor
    return total


def dequantise(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Do what `int4.from_int4` does, without memory for anything but the result."""
    num_outputs, num_columns = weight.shape
    out = torch.empty(num_outputs, PLANES * num_columns, dtype=dtype, device=weight.device)
    grid = (triton.cdiv(num_outputs, _ROWS), triton.cdiv(num_columns, _COLUMNS))
    _dequantise[grid](
        out, weight, scale, num_outputs, num_columns, GROUP=group_of(weight, scale), ZEROS=len(scale) == 2,
        ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _dequantise(
    out: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    num_outputs: tl.tensor,
    num_columns: tl.tensor,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Grid (outputs / ROWS, columns / COLUMNS)."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    is_own = (n < num_outputs) & (c < num_columns)
    tile = tl.load(weight + n.to(tl.int64) * num_columns + c, mask=is_own, other=0)
    out_at = out + n.to(tl.int64) * (8 * num_columns) + c
    num_groups = 8 * num_columns // GROUP
    for j in tl.static_range(8):
        scale_at = scale + n * num_groups + (j * num_columns + c) // GROUP
        zero = 8.0
        if ZEROS:
            zero = tl.load(scale_at + num_outputs * num_groups, mask=is_own, other=0.0).to(tl.float32)
        number = ((tile >> (4 * j)) & 15).to(tl.float32) - zero
        value = number * tl.load(scale_at, mask=is_own, other=0.0).to(tl.float32)
        tl.store(out_at + j * num_columns, value.to(out.dtype.element_ty), mask=is_own)
