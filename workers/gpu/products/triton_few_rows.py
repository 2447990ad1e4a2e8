"""Products of few rows, y = x w^T: kernels that read each weight once, at about the rate of the device's memory.

A product of few rows is bound by reading its weights. `vector` serves one or two rows: a program owns a few outputs,
reads their weights in runs, and multiplies in float32. `matrix` serves up to 64 rows on the matrix units, weights as
the left operand. Where outputs are few, several programs share the inputs of an output (`split`); the last of them to
end sums the shares in fixed order, so results do not depend on timing.

Both kernels take part in programmatic dependent launch: they wait for the kernel before to end, and then let the next
one start. In this order, what the next kernel reads of kernels before this one is complete, even where it does not
wait. Weights depend on no kernel, so `vector` reads its first tile before it waits.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from workers.gpu.products.plan import VECTOR_ROWS, Plan

_SHARES = 1 << 22  # float32 values that programs of one product can share


class Scratch:
    """Memory of a device for products that are split. Products of one stream follow each other, so all share it."""

    def __init__(self, device: torch.device) -> None:
        self.shares = torch.empty(_SHARES, dtype=torch.float32, device=device)
        self.ended = torch.zeros(1 << 14, dtype=torch.int32, device=device)  # programs, by tile of outputs; 0 at rest

    def fits(self, plan: Plan, num_rows: int, num_outputs: int) -> bool:
        has_shares = plan.split * num_rows * num_outputs <= self.shares.numel()
        return plan.split == 1 or (has_shares and num_outputs // plan.tile_n <= self.ended.numel())


def multiply_few_rows(
    plan: Plan,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    scratch: Scratch,
    *,
    dependent_launch: bool,
) -> None:
    """Write x [M, K] times `weight` [N, K] to `out` [M, N], both of one 16-bit dtype (or float32) and with whole rows.

    `weight` has the dtype of x, or fp8 with a `scale` [N] float32 for each output. `bias` [N] is added before rounding.
    """
    num_rows, num_inputs = x.shape
    num_outputs = weight.shape[0]
    for rows in (x, weight, out):
        assert rows.stride(1) == 1, "rows are read and written in runs"
    assert plan.fits(num_outputs, num_inputs), f"{plan} for {num_outputs} x {num_inputs}"
    assert scratch.fits(plan, num_rows, num_outputs), f"{plan} for {num_rows} rows of {num_outputs}"
    tensors = out, x, weight, weight if scale is None else scale, weight if bias is None else bias
    common = {
        "TILE_N": plan.tile_n, "TILE_K": plan.tile_k, "STAGES": plan.stages, "SCALED": scale is not None,
        "BIAS": bias is not None, "DEPENDENT_LAUNCH": dependent_launch,
    }  # fmt: skip
    options = {"num_warps": plan.warps, "num_stages": plan.stages} | ({"launch_pdl": True} if dependent_launch else {})
    num_tiles = num_outputs // plan.tile_n
    if plan.kernel == "vector":
        assert num_rows <= VECTOR_ROWS
        _vector[(num_tiles,)](
            *tensors, x.stride(0), num_outputs, num_inputs, RUN=min(16 // weight.itemsize, plan.tile_k),
            TWO_ROWS=num_rows == 2, **common, **options,
        )  # fmt: skip
        return
    _matrix[(num_tiles, plan.split)](
        *tensors, scratch.shares, scratch.ended, num_rows, x.stride(0), num_outputs, num_inputs,
        num_inputs // plan.split, ROWS=max(16, triton.next_power_of_2(num_rows)), HAS_SPLIT=plan.split > 1,
        **common, **options,
    )  # fmt: skip


@triton.jit
def _sum_of_products(
    total: tl.tensor, weights: tl.tensor, x: tl.tensor, TILE_N: tl.constexpr, TILE_K: tl.constexpr, RUN: tl.constexpr
) -> tl.tensor:
    """Add weights [TILE_N, TILE_K] times x [TILE_K] to total [TILE_N, TILE_K / RUN]. RUN neighbours make one sum."""
    return total + tl.sum(tl.reshape(weights * x[None, :], [TILE_N, TILE_K // RUN, RUN]), 2)


@triton.jit
def _vector(
    out: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    x_stride: tl.tensor,
    num_outputs: tl.tensor,
    num_inputs: tl.tensor,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    RUN: tl.constexpr,  # weights in 16 bytes, which a thread reads at once
    STAGES: tl.constexpr,
    TWO_ROWS: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    DEPENDENT_LAUNCH: tl.constexpr,
) -> None:
    """Grid (N / TILE_N). One row of x, or two."""
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    k = tl.arange(0, TILE_K)
    weight_at = weight + n[:, None].to(tl.int64) * num_inputs + k[None, :]
    tile = tl.zeros([TILE_N, TILE_K], weight.dtype.element_ty)
    if STAGES == 1:
        tile = tl.load(weight_at, eviction_policy="evict_first")
    if DEPENDENT_LAUNCH:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros([TILE_N, TILE_K // RUN], tl.float32)
    total2 = total
    for begin in tl.range(0, num_inputs, TILE_K, num_stages=STAGES):
        next_tile = tile
        if STAGES == 1:
            after = begin + TILE_K
            next_tile = tl.load(weight_at + after, mask=after < num_inputs, eviction_policy="evict_first")
        else:
            tile = tl.load(weight_at + begin, eviction_policy="evict_first")
        weights = tile.to(tl.float32)
        total = _sum_of_products(total, weights, tl.load(x + begin + k).to(tl.float32), TILE_N, TILE_K, RUN)
        if TWO_ROWS:
            second = tl.load(x + x_stride + begin + k).to(tl.float32)
            total2 = _sum_of_products(total2, weights, second, TILE_N, TILE_K, RUN)
        if STAGES == 1:
            tile = next_tile
    _write_row(out, total, scale, bias, n, SCALED, BIAS)
    if TWO_ROWS:
        _write_row(out + num_outputs, total2, scale, bias, n, SCALED, BIAS)


@triton.jit
def _write_row(
    out: tl.tensor,
    total: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    n: tl.tensor,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
) -> None:
    result = tl.sum(total, 1)
    if SCALED:
        result *= tl.load(scale + n)
    if BIAS:
        result += tl.load(bias + n).to(tl.float32)
    tl.store(out + n, result.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["num_rows"])
def _matrix(
    out: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    shares: tl.tensor,  # [splits, M, N] float32
    ended: tl.tensor,  # [N / TILE_N] int32
    num_rows: tl.tensor,
    x_stride: tl.tensor,
    num_outputs: tl.tensor,
    num_inputs: tl.tensor,
    own_inputs: tl.tensor,  # of a program; an argument, so that the compiler knows that reads of a row are aligned
    ROWS: tl.constexpr,  # at least M
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_SPLIT: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    DEPENDENT_LAUNCH: tl.constexpr,
) -> None:
    """Grid (N / TILE_N, splits). Computes tiles of the transposed result: outputs by rows of x."""
    if DEPENDENT_LAUNCH:
        gdc_wait()
        gdc_launch_dependents()
    tile_n = tl.program_id(0)
    split = tl.program_id(1)
    n = tile_n * TILE_N + tl.arange(0, TILE_N)[:, None]
    m = tl.arange(0, ROWS)[None, :]
    k = split * own_inputs + tl.arange(0, TILE_K)
    weight_at = weight + n.to(tl.int64) * num_inputs + k[None, :]
    x_at = x + m * x_stride + k[:, None]
    total = tl.zeros([TILE_N, ROWS], tl.float32)
    for begin in tl.range(0, own_inputs, TILE_K, num_stages=STAGES):
        tile = tl.load(weight_at + begin, eviction_policy="evict_first")
        x_tile = tl.load(x_at + begin, mask=m < num_rows, other=0.0)
        if SCALED:
            tile = tile.to(tl.float32)  # directly to bfloat16, each weight would take an instruction of its own
        total = tl.dot(tile.to(x.dtype.element_ty), x_tile, total, input_precision="ieee")
    is_last = True
    if HAS_SPLIT:
        share_at = shares + m * num_outputs + n
        tl.store(share_at + split * num_rows * num_outputs, total, mask=m < num_rows)
        tl.debug_barrier()
        before = tl.atomic_add(ended + tile_n, 1, sem="acq_rel", scope="gpu")
        is_last = before == tl.num_programs(1) - 1
        if is_last:
            tl.store(ended + tile_n, 0)
            total = tl.zeros([TILE_N, ROWS], tl.float32)
            for i in range(tl.num_programs(1)):
                share = tl.load(
                    share_at + i * num_rows * num_outputs, mask=m < num_rows, other=0.0, cache_modifier=".cg"
                )
                total += share
    if is_last:
        if SCALED:
            total *= tl.load(scale + n)
        if BIAS:
            total += tl.load(bias + n).to(tl.float32)
        tl.store(out + m * num_outputs + n, total.to(out.dtype.element_ty), mask=m < num_rows)


def rows_to_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x [M, K] in fp8 and the float32 scale [M, 1] of each row; see `fp8.to_fp8`."""
    num_rows, num_inputs = x.shape
    values = torch.empty(num_rows, num_inputs, dtype=torch.float8_e4m3fn, device=x.device)
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
    own_scale = tl.maximum(tl.max(tl.abs(own), 0) / 448.0, 7.888609052210118e-31)
    tl.store(scale + row, own_scale)
    tl.store(values + row * num_inputs + k, (own / own_scale).to(tl.float8e4nv), mask=k < num_inputs)
