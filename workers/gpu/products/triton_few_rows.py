"""Products of few rows, y = x w^T: kernels that read each weight once, at about the rate of the device's memory.

A product of few rows is bound by reading its weights. `vector` serves one or two rows: a program owns a few outputs,
reads their weights in runs, and multiplies in float32. `matrix` serves up to 64 rows on the matrix units, weights as
the left operand. Where outputs are few, several programs share the inputs of an output (`split`); the last of them to
end sums the shares in fixed order, so results do not depend on timing.

Both kernels take part in programmatic dependent launch: they wait for the kernel before to end, and then let the next
one start. In this order, what the next kernel reads of kernels before this one is complete, even where it does not
wait. Weights depend on no kernel, so `vector` reads its first tile before it waits, and `matrix` asks for its first
tiles in the device's L2 cache.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from workers.gpu.products.triton_blocks import add_dot
from workers.gpu.products.triton_int4 import add_planes, dot_planes
from workers.gpu.products.triton_prefetch import prefetch_rows


@triton.jit
def _add_products(
    total: tl.tensor, weights: tl.tensor, x: tl.tensor, TILE_N: tl.constexpr, TILE_K: tl.constexpr, RUN: tl.constexpr
) -> tl.tensor:
    """Add weights [TILE_N, TILE_K] times x [TILE_K] to total [TILE_N, TILE_K / RUN]. RUN neighbours make one sum."""
    return total + tl.sum(tl.reshape(weights * x[None, :], [TILE_N, TILE_K // RUN, RUN]), 2)


@triton.jit
def _finish(
    total: tl.tensor,  # of outputs n, or of gates
    values: tl.tensor,  # of outputs n + num_outputs, if GATED
    scale: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    n: tl.tensor,
    num_outputs: tl.tensor,
    mask: tl.tensor,  # of the rows that exist; None = all
    GATED: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
) -> tl.tensor:
    """Turn sums of products into results."""
    if SCALED:
        total *= tl.load(scale + n)
    if BIAS:
        total += tl.load(bias + n).to(tl.float32)
    if GATED:
        if SCALED:
            values *= tl.load(scale + n + num_outputs)
        if BIAS:
            values += tl.load(bias + n + num_outputs).to(tl.float32)
        total = total / (1.0 + tl.exp(-total)) * values
    if RESIDUAL:
        total += tl.load(residual, mask=mask).to(tl.float32)
    return total


@triton.jit
def _vector(
    out: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    x_stride: tl.tensor,
    num_outputs: tl.tensor,  # of `out`
    num_inputs: tl.tensor,  # columns of the weight; in 4 bits an eighth of the inputs, and so for tiles
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    RUN: tl.constexpr,  # weights in 16 bytes, which a thread reads at once
    STAGES: tl.constexpr,
    TWO_ROWS: tl.constexpr,
    GATED: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GROUP: tl.constexpr,  # inputs of a group of 4 bits; 0 = another format
    ZEROS: tl.constexpr,  # whether groups have zero points
    DEPENDENT_LAUNCH: tl.constexpr,
) -> None:
    """Grid (outputs / TILE_N). One row of x, or two."""
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    k = tl.arange(0, TILE_K)
    weight_at = weight + n[:, None].to(tl.int64) * num_inputs + k[None, :]
    values_at = weight_at + num_outputs.to(tl.int64) * num_inputs
    num_groups = 8 * num_inputs // GROUP if GROUP else 0
    zeros_after = num_groups * num_outputs * (2 if GATED else 1)
    tile = tl.zeros([TILE_N, TILE_K], weight.dtype.element_ty)
    values = tile
    if STAGES == 1:
        tile = tl.load(weight_at, eviction_policy="evict_first")
        if GATED:
            values = tl.load(values_at, eviction_policy="evict_first")
    if DEPENDENT_LAUNCH:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros([TILE_N, TILE_K // RUN], tl.float32)
    total2 = total
    values_total = total
    values_total2 = total
    for begin in tl.range(0, num_inputs, TILE_K, num_stages=STAGES):
        next_tile = tile
        next_values = values
        if STAGES == 1:
            after = begin + TILE_K
            next_tile = tl.load(weight_at + after, mask=after < num_inputs, eviction_policy="evict_first")
            if GATED:
                next_values = tl.load(values_at + after, mask=after < num_inputs, eviction_policy="evict_first")
        else:
            tile = tl.load(weight_at + begin, eviction_policy="evict_first")
            if GATED:
                values = tl.load(values_at + begin, eviction_policy="evict_first")
        if GROUP:
            total, total2 = add_planes(
                total, total2, tile, x + begin + k, x_stride, scale + n * num_groups, zeros_after, num_inputs, begin,
                RUN, GROUP, ZEROS, TWO_ROWS,
            )  # fmt: skip
            if GATED:
                values_total, values_total2 = add_planes(
                    values_total, values_total2, values, x + begin + k, x_stride,
                    scale + (num_outputs + n) * num_groups, zeros_after, num_inputs, begin,
                    RUN, GROUP, ZEROS, TWO_ROWS,
                )  # fmt: skip
        else:
            own = tile.to(tl.float32)
            row = tl.load(x + begin + k).to(tl.float32)
            total = _add_products(total, own, row, TILE_N, TILE_K, RUN)
            if TWO_ROWS:
                row2 = tl.load(x + x_stride + begin + k).to(tl.float32)
                total2 = _add_products(total2, own, row2, TILE_N, TILE_K, RUN)
            if GATED:
                own_values = values.to(tl.float32)
                values_total = _add_products(values_total, own_values, row, TILE_N, TILE_K, RUN)
                if TWO_ROWS:
                    values_total2 = _add_products(values_total2, own_values, row2, TILE_N, TILE_K, RUN)
        if STAGES == 1:
            tile = next_tile
            values = next_values
    result = _finish(
        tl.sum(total, 1), tl.sum(values_total, 1), scale, bias, residual + n, n, num_outputs, None,
        GATED, SCALED, BIAS, RESIDUAL,
    )  # fmt: skip
    tl.store(out + n, result.to(out.dtype.element_ty))
    if TWO_ROWS:
        at = num_outputs + n
        result = _finish(
            tl.sum(total2, 1), tl.sum(values_total2, 1), scale, bias, residual + at, n, num_outputs,
            None, GATED, SCALED, BIAS, RESIDUAL,
        )  # fmt: skip
        tl.store(out + at, result.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["num_rows"])
def _matrix(
    out: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    shares: tl.tensor,  # [splits, 1 or 2 with GATED, M, outputs] float32
    ended: tl.tensor,  # [outputs / TILE_N] int32
    num_rows: tl.tensor,
    x_stride: tl.tensor,
    num_outputs: tl.tensor,  # of `out`
    num_inputs: tl.tensor,  # as in `_vector`
    own_inputs: tl.tensor,  # of a program; an argument, so that the compiler knows that reads of a row are aligned
    ROWS: tl.constexpr,  # at least M
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_SPLIT: tl.constexpr,
    GATED: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GROUP: tl.constexpr,  # inputs of a group of 4 bits; 0 = another format
    ZEROS: tl.constexpr,  # whether groups have zero points
    BLOCK: tl.constexpr,  # outputs and inputs of a block of fp8 with one scale, which tiles divide; 0 = another format
    LINES: tl.constexpr,  # of a row of weights that a program prefetches; 0 = none
    DEPENDENT_LAUNCH: tl.constexpr,
) -> None:
    """Grid (outputs / TILE_N, splits). Computes tiles of the transposed result: outputs by rows of x."""
    tile_n = tl.program_id(0)
    split = tl.program_id(1)
    n = tile_n * TILE_N + tl.arange(0, TILE_N)[:, None]
    if DEPENDENT_LAUNCH:
        if LINES:
            row_at = weight + n.to(tl.int64) * num_inputs + split * own_inputs
            prefetch_rows(row_at, own_inputs, LINES)
            if GATED:
                prefetch_rows(row_at + num_outputs.to(tl.int64) * num_inputs, own_inputs, LINES)
        gdc_wait()
        gdc_launch_dependents()
    m = tl.arange(0, ROWS)[None, :]
    k = split * own_inputs + tl.arange(0, TILE_K)
    weight_at = weight + n.to(tl.int64) * num_inputs + k[None, :]
    values_at = weight_at + num_outputs.to(tl.int64) * num_inputs
    x_at = x + m * x_stride + k[:, None]
    num_groups = 8 * num_inputs // GROUP if GROUP else 0
    zeros_after = num_groups * num_outputs * (2 if GATED else 1)
    if BLOCK:
        num_blocks = num_inputs // BLOCK
        block_at = scale + tile_n * TILE_N // BLOCK * num_blocks
        values_block_at = scale + (num_outputs + tile_n * TILE_N) // BLOCK * num_blocks
    total = tl.zeros([TILE_N, ROWS], tl.float32)
    values = total
    for begin in tl.range(0, own_inputs, TILE_K, num_stages=STAGES):
        tile = tl.load(weight_at + begin, eviction_policy="evict_first")
        if GROUP:
            scale_at = scale + (tile_n * TILE_N + tl.arange(0, TILE_N)) * num_groups
            column = split * own_inputs + begin
            total = dot_planes(
                total, tile, x_at + begin, m < num_rows, scale_at, zeros_after, num_inputs, column, GROUP, ZEROS
            )  # fmt: skip
            if GATED:
                tile = tl.load(values_at + begin, eviction_policy="evict_first")
                values = dot_planes(
                    values, tile, x_at + begin, m < num_rows, scale_at + num_outputs * num_groups, zeros_after,
                    num_inputs, column, GROUP, ZEROS,
                )  # fmt: skip
        else:
            x_tile = tl.load(x_at + begin, mask=m < num_rows, other=0.0)
            block = (split * own_inputs + begin) // BLOCK if BLOCK else 0
            total = add_dot(total, tile, x_tile, block_at + block if BLOCK else None, SCALED)
            if GATED:
                tile = tl.load(values_at + begin, eviction_policy="evict_first")
                values = add_dot(values, tile, x_tile, values_block_at + block if BLOCK else None, SCALED)
    is_own = m < num_rows
    at = m * num_outputs + n
    is_last = True
    if HAS_SPLIT:
        share_size = num_rows * num_outputs
        if GATED:
            share_size *= 2
        share_at = shares + at
        tl.store(share_at + split * share_size, total, mask=is_own)
        if GATED:
            tl.store(share_at + split * share_size + num_rows * num_outputs, values, mask=is_own)
        tl.debug_barrier()
        before = tl.atomic_add(ended + tile_n, 1, sem="acq_rel", scope="gpu")
        is_last = before == tl.num_programs(1) - 1
        if is_last:
            tl.store(ended + tile_n, 0)
            total = tl.zeros([TILE_N, ROWS], tl.float32)
            values = total
            for i in range(tl.num_programs(1)):
                total += tl.load(share_at + i * share_size, mask=is_own, other=0.0, cache_modifier=".cg")
                if GATED:
                    values_at_share = share_at + i * share_size + num_rows * num_outputs
                    values += tl.load(values_at_share, mask=is_own, other=0.0, cache_modifier=".cg")
    if is_last:
        result = _finish(
            total, values, scale, bias, residual + at, n, num_outputs, is_own, GATED, SCALED, BIAS, RESIDUAL
        )
        tl.store(out + at, result.to(out.dtype.element_ty), mask=is_own)
