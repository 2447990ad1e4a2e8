"""Kernels before and after products of many rows: rows in fp8, and gates times values."""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from workers.gpu.device.dependent_launch import launch_options
from workers.gpu.e4m3 import E4M3, E4M3_MAX
from workers.gpu.products.fp8 import SMALLEST_SCALE

_GATE_BLOCK = 2048
_LARGEST = tl.constexpr(E4M3_MAX)
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)


def gate(x: torch.Tensor, out: torch.Tensor, *, dependent_launch: bool) -> None:
    """Write silu(x[:, :N]) * x[:, N:] to `out` [M, N]; x [M, 2 N] has whole rows."""
    num_rows, num_outputs = out.shape
    for rows in (x, out):
        assert rows.is_contiguous(), "rows follow each other"
    _gate[(num_rows, triton.cdiv(num_outputs, _GATE_BLOCK))](
        out, x, num_outputs, BLOCK=_GATE_BLOCK, DEPENDENT_LAUNCH=dependent_launch, num_warps=4,
        **launch_options(dependent=dependent_launch),
    )  # fmt: skip


@triton.jit
def _gate(
    out: tl.tensor, x: tl.tensor, num_outputs: tl.tensor, BLOCK: tl.constexpr, DEPENDENT_LAUNCH: tl.constexpr
) -> None:
    if DEPENDENT_LAUNCH:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_own = n < num_outputs
    own_gate = tl.load(x + row * 2 * num_outputs + n, mask=is_own, other=0.0).to(tl.float32)
    value = tl.load(x + row * 2 * num_outputs + num_outputs + n, mask=is_own, other=0.0).to(tl.float32)
    result = own_gate / (1.0 + tl.exp(-own_gate)) * value
    tl.store(out + row * num_outputs + n, result.to(out.dtype.element_ty), mask=is_own)


def rows_to_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x [M, K] in fp8 and the float32 scale [M, 1] of each row; see `fp8.to_fp8`."""
    assert x.stride(1) == 1, "rows are read in runs"
    num_rows, num_inputs = x.shape
    values = torch.empty(num_rows, num_inputs, dtype=E4M3, device=x.device)
    scale = torch.empty(num_rows, 1, dtype=torch.float32, device=x.device)
    _rows_to_fp8[(num_rows,)](values, scale, x, x.stride(0), num_inputs, BLOCK=triton.next_power_of_2(num_inputs))
    return values, scale


@triton.jit
def _rows_to_fp8(
    values: tl.tensor, scale: tl.tensor, x: tl.tensor, x_stride: tl.tensor, num_inputs: tl.tensor, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    own = tl.load(x + row * x_stride + k, mask=k < num_inputs, other=0.0).to(tl.float32)
    own_scale = tl.maximum(tl.max(tl.abs(own), 0) / _LARGEST, _SMALLEST_SCALE)
    tl.store(scale + row, own_scale)
    tl.store(values + row * num_inputs + k, (own / own_scale).to(tl.float8e4nv), mask=k < num_inputs)
