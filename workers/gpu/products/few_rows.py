"""Launches the kernels for few rows, and keeps the memory that they share."""

from __future__ import annotations

from functools import cache
from typing import Final

import torch
import triton

from workers.gpu.device.dependent_launch import launch_options
from workers.gpu.products.fp8 import BLOCK, has_blocks
from workers.gpu.products.int4 import PLANES, group_of
from workers.gpu.products.plan import MAX_SHARES, VECTOR_ROWS, Plan
from workers.gpu.products.triton_few_rows import _matrix, _vector
from workers.gpu.products.triton_words import _words

_LINE: Final = 128  # bytes that the L2 cache reads at once
_RUN: Final = 16  # bytes that a thread reads at once


class Scratch:
    """Memory of a device for products that are split. Products of one stream follow each other, so all share it."""

    def __init__(self, device: torch.device) -> None:
        self.shares = torch.empty(MAX_SHARES, dtype=torch.float32, device=device)
        self.ended = torch.zeros(1 << 14, dtype=torch.int32, device=device)  # programs, by tile of outputs; 0 at rest


def multiply_few_rows(
    plan: Plan,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    scratch: Scratch,
    *,
    is_gated: bool,
    dependent_launch: bool,
) -> None:
    """Write x [M, K] times `weight` [N, K] to `out` [M, N]. x and `out` have one dtype, of 16 bits or float32. Weights
    and `out` are contiguous; the rows of x may have gaps between them.

    `weight` has the dtype of x, or fp8 with a float32 `scale` of outputs or of blocks, or is [N, K / 8] in 4 bits with
    a `scale` [1 or 2, N, K / G]. `bias` [N] and `residual` [M, N] are added before rounding. `is_gated`: the outputs
    are gates and as many values, and `out` [M, N / 2] gets silu(gate) times value.

    With a plan that `can_pad`, x may have one row for two of `out`: the second becomes zero.
    """
    num_rows, num_outputs = out.shape
    num_columns, group = weight.shape[1], group_of(weight, scale)
    num_padding = num_rows - len(x)
    assert x.shape[1] == num_columns * (PLANES if group else 1)
    assert num_padding == 0 or (num_rows == 2 and num_padding == 1 and plan.can_pad())
    assert x.stride(1) == 1, "rows are read in runs"
    if x.data_ptr() % _RUN or (len(x) > 1 and x.stride(0) * x.itemsize % _RUN):
        x = x.clone(memory_format=torch.contiguous_format)
    for rows in (weight, out, *(() if scale is None else (scale,))):
        assert rows.is_contiguous(), "rows follow each other"
    block = BLOCK if has_blocks(scale) else 0
    assert plan.fits(num_outputs, num_columns, group, block), f"{plan} for {num_outputs} x {num_columns}, {group}"
    num_tiles = num_outputs // plan.tile_n
    assert plan.can_share(num_rows, weight.shape[0]), f"{plan} for {num_rows} rows of {weight.shape[0]}"
    assert plan.split == 1 or num_tiles <= scratch.ended.numel(), f"{plan} for {num_outputs} outputs"
    assert residual is None or residual.is_contiguous(), "a residual is read as the result is written"
    tensors = [out, x, weight, *(weight if each is None else each for each in (scale, bias, residual))]
    common = {
        "TILE_N": plan.tile_n, "TILE_K": plan.tile_k, "STAGES": plan.stages, "GATED": is_gated,
        "BIAS": bias is not None, "RESIDUAL": residual is not None, "DEPENDENT_LAUNCH": dependent_launch,
    }  # fmt: skip
    options = {"num_warps": plan.warps, "num_stages": plan.stages, **launch_options(dependent=dependent_launch)}
    assert plan.kernel == "matrix" or num_rows <= VECTOR_ROWS
    if plan.kernel == "words":
        assert weight.itemsize <= 2
        assert group == 0
        _words[(num_tiles,)](
            *tensors, x.stride(0), num_outputs, num_columns, TWO_ROWS=len(x) == 2, PADDING=num_padding == 1,
            SCALED=scale is not None and not block, BLOCK=block, NATIVE=converts_fp8(x.device),
            LINES=_lines(plan, num_columns, weight.itemsize), **common, **options,
        )  # fmt: skip
        return
    common |= {
        "SCALED": scale is not None and scale.ndim == 1, "GROUP": group,
        "ZEROS": scale is not None and group > 0 and len(scale) == 2,
    }  # fmt: skip
    if plan.kernel == "vector":
        _vector[(num_tiles,)](
            *tensors, x.stride(0), num_outputs, num_columns, RUN=min(_RUN // weight.itemsize, plan.tile_k),
            TWO_ROWS=num_rows == 2, **common, **options,
        )  # fmt: skip
        return
    _matrix[(num_tiles, plan.split)](
        *tensors, scratch.shares, scratch.ended, num_rows, x.stride(0), num_outputs, num_columns,
        num_columns // plan.split, ROWS=max(16, triton.next_power_of_2(num_rows)), HAS_SPLIT=plan.split > 1,
        BLOCK=block, LINES=_lines(plan, num_columns // plan.split, weight.itemsize), **common, **options,
    )  # fmt: skip


def _lines(plan: Plan, num_columns: int, itemsize: int) -> int:
    """Lines of the L2 cache that the reads of weights under way at once take of each row of `num_columns`, as a power
    of 2."""
    lines = min(plan.tile_k * plan.stages, num_columns) * itemsize // _LINE
    return triton.next_power_of_2(lines) if lines > 0 else 0


@cache
def converts_fp8(device: torch.device) -> bool:
    """Whether the device has an instruction for it: compute capability 8.9 and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
