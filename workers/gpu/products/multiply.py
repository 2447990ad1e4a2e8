"""Computes a product in the way that was found fastest on this device, or as the vendor's library does.

`ringfeed::multiply` and `ringfeed::multiply_gated` are operators of a compiled graph, because compiled code serves any
number of rows, and the way depends on it. The ways are chosen at start (see `tuning`), and are the same for all
products of a shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch.nn.functional import linear, silu

from workers.gpu.device.dependent_launch import is_dependent_launch_possible
from workers.gpu.e4m3 import E4M3
from workers.gpu.products.fp8 import BLOCK, from_fp8, has_blocks
from workers.gpu.products.int4 import from_int4, group_of
from workers.gpu.products.plan import Plan, row_class

_FP8_UNIT: Final = 16  # the vendor's product takes multiples of it

# N, columns and dtype of a weight, and the inputs of a group of 4 bits or of a block of fp8, or 0
Shape = tuple[int, int, torch.dtype, int]
# the shape, the dtype of x, one of ROW_CLASSES, whether the outputs are gates and values
Key = tuple[Shape, torch.dtype, int, bool]

chosen: dict[Key, Plan] = {}  # of this process; products without an entry are the vendor's
dequantised: set[Shape] = set()  # in blocks of fp8, whose kernel for many rows does not work on this device
_scratch: dict[torch.device, Any] = {}
_only_first_row_counts = False  # in the current forward; this process runs one forward at a time


@contextmanager
def only_first_row_counts(is_so: bool) -> Iterator[None]:
    """Products of two rows inside this block may leave the second one zero, if `is_so`."""
    global _only_first_row_counts
    outer, _only_first_row_counts = _only_first_row_counts, is_so
    try:
        yield
    finally:
        _only_first_row_counts = outer


def shape_of(weight: torch.Tensor, scale: torch.Tensor | None) -> Shape:
    group = BLOCK if has_blocks(scale) else group_of(weight, scale)
    return weight.shape[0], weight.shape[1], weight.dtype, group


def key_of(
    weight: torch.Tensor, scale: torch.Tensor | None, x_dtype: torch.dtype, rows: int, is_gated: bool = False
) -> Key:
    return shape_of(weight, scale), x_dtype, rows, is_gated


def multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    is_gated: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x [M, K] times `weight` [N, K] plus `bias` [N] and `residual` [M, N], as [M, N] in the dtype of x.

    `weight` has x's dtype, or is fp8 with a float32 `scale` of outputs or of blocks, see `fp8`, or is [N, K / 8] in
    4 bits with a `scale` [1 or 2, N, K / G], see `int4`. `is_gated`: the outputs are N / 2 gates and as many values,
    and the result is silu(gate) times value, [M, N / 2]. The result is in `out`, if that is given.

    Without a plan, a weight in 4 bits is dequantised for this product only, and so is one in blocks of fp8 if
    `can_scale` says that its product cannot be computed in fp8.
    """
    if x.stride(1) != 1:  # kernels read rows in runs
        x = x.contiguous()
    rows = row_class(x.shape[0])
    plan = None
    if rows is not None and x.is_cuda:
        plan = chosen.get(key_of(weight, scale, x.dtype, rows, is_gated))
    if plan is not None:
        return run_plan(plan, x, weight, scale, bias, residual, is_gated=is_gated, out=out)
    has_rows = len(x) > 0  # an expert may get no tokens
    is_scaled = scale is not None and has_rows and can_scale(weight, scale, x.dtype, x.device)
    if scale is not None and scale.ndim > 1 and not is_scaled:
        weight, scale = _dequantised(weight, scale, x.dtype), None
    if is_gated or (residual is not None and scale is not None):
        result = multiply(x, weight, scale, bias)
        result = gated(result) if is_gated else result
        result = result if residual is None else result.add_(residual)
        return result if out is None else out.copy_(result)
    if scale is None:
        return _plain(x, weight, bias, residual, out)
    if is_scaled:
        return _scaled(x, weight, scale, bias, out)
    return _unscaled(x, weight, scale, bias, out)


def run_plan(
    plan: Plan,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    is_gated: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Do what `multiply` does, by a plan that fits."""
    from workers.gpu.products.few_rows import Scratch, multiply_few_rows  # without CUDA there may be no triton

    if out is None:
        out = x.new_empty(x.shape[0], weight.shape[0] // 2 if is_gated else weight.shape[0])
    if x.device not in _scratch:
        _scratch[x.device] = Scratch(x.device)
    if _only_first_row_counts and len(x) == 2 and plan.can_pad():
        x = x[:1]
    multiply_few_rows(
        plan, x, weight, scale, bias, residual, out, _scratch[x.device], is_gated=is_gated,
        dependent_launch=is_dependent_launch_possible(x.device),
    )  # fmt: skip
    return out


def gated(x: torch.Tensor) -> torch.Tensor:
    """Return silu(x[:, :N]) * x[:, N:] of x [M, 2 N]."""
    gates, values = x.chunk(2, -1)
    if not x.is_cuda:
        return silu(gates) * values
    from workers.gpu.products.triton_rows import gate

    out = torch.empty_like(gates, memory_format=torch.contiguous_format)
    gate(x, out, dependent_launch=is_dependent_launch_possible(x.device))
    return out


def _dequantised(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight in 4 bits, or in blocks of fp8, as [N, K] in `dtype`."""
    if has_blocks(scale):
        return from_fp8(weight, scale, dtype)
    if not weight.is_cuda:
        return from_int4(weight, scale, dtype)
    from workers.gpu.products.triton_int4 import dequantise

    return dequantise(weight, scale, dtype)


def _plain(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor | None,
) -> torch.Tensor:
    if residual is None and out is None:
        return linear(x, weight, bias)
    if residual is None:
        torch.mm(x, weight.t(), out=out)
    else:
        out = torch.addmm(residual, x, weight.t()) if out is None else torch.addmm(residual, x, weight.t(), out=out)
    assert out is not None
    return out if bias is None else out.add_(bias)


def _unscaled(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None
) -> torch.Tensor:
    """The product in the dtype of x."""
    if x.dtype == torch.float16:  # without its scale, a product could be too large for it
        return _plain(x, from_fp8(weight, scale, x.dtype), bias, None, out)
    result = (linear(x, weight.to(x.dtype)).float() * scale).to(x.dtype)  # a weight without its scale is exact
    if bias is not None:
        result += bias
    return result if out is None else out.copy_(result)


def can_scale(weight: torch.Tensor, scale: torch.Tensor, x_dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `device` multiplies by this weight in fp8, by the vendor's library, or by our kernel for blocks."""
    if device.type != "cuda" or weight.dtype != E4M3 or torch.cuda.get_device_capability(device) < (8, 9):
        return False
    if has_blocks(scale):
        return x_dtype.itemsize == 2 and shape_of(weight, scale) not in dequantised
    is_whole = weight.shape[0] % _FP8_UNIT == 0 and weight.shape[1] % _FP8_UNIT == 0
    return is_whole and x_dtype == torch.bfloat16  # the only dtype of results with a scale for each row


def _scaled(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None
) -> torch.Tensor:
    """The product in fp8: x gets a scale for each row, as it comes, and for blocks one for each group of inputs."""
    if has_blocks(scale):
        from workers.gpu.products.triton_blocks import multiply_blocks

        out = x.new_empty(x.shape[0], weight.shape[0]) if out is None else out
        multiply_blocks(x, weight, scale, bias, out)
        return out
    from workers.gpu.products.triton_rows import rows_to_fp8

    values, x_scale = rows_to_fp8(x)
    result = torch._scaled_mm(
        values, weight.t(), scale_a=x_scale, scale_b=scale[None, :], bias=bias, out_dtype=x.dtype, use_fast_accum=True
    )
    return result if out is None else out.copy_(result)


@torch.library.custom_op("ringfeed::multiply", mutates_args=())
def _multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    return multiply(x, weight, scale, bias, None if residual is None else residual.contiguous())


@_multiply.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("ringfeed::multiply_gated", mutates_args=())
def _multiply_gated(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    return multiply(x, weight, scale, bias, is_gated=True)


@_multiply_gated.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] // 2)
