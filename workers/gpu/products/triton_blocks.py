"""Products of many rows with weights in fp8 that have a scale for each block of 128 outputs and 128 inputs.

Each row of x is rounded to fp8 with a scale for each group of 128 inputs. So 128 inputs of a tile of results have one
factor for each row: the matrix units sum their products in fp8, and the sums are added in float32 times this factor.

Few rows have kernels of their own, which keep x in its dtype. `add_dot` serves the one on the matrix units.

Sources of the scheme: DeepSeek-V3's technical report, section 3.3.2, and its inference/kernel.py.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from workers.gpu.e4m3 import E4M3, E4M3_MAX
from workers.gpu.products.fp8 import BLOCK, SMALLEST_SCALE
from workers.gpu.products.plan import MULTIPROCESSORS

_GROUPS: Final = 16  # of a row that a program rounds
TILES: Final = ((128, 128), (64, 128), (64, 64), (64, 32))  # rows and outputs of a program; outputs divide a block
_NEIGHBOURS: Final = 8  # tiles of rows that share weights in the L2 cache
_LARGEST = tl.constexpr(E4M3_MAX)
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)


def multiply_blocks(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    tile: tuple[int, int] | None = None,
) -> None:
    """Write x [M, K] times `weight` [N, K] plus `bias` [N] to `out` [M, N], which has a dtype of 16 bits or float32.

    `weight` is in fp8 with the `scale` [ceil(N / 128), K / 128] of its blocks. x is rounded to fp8. Without a `tile`,
    one of TILES, the largest one serves that gives each multiprocessor a program.
    """
    num_rows, num_inputs = x.shape
    num_outputs = weight.shape[0]
    assert out.shape == (num_rows, num_outputs)
    assert scale.shape == (triton.cdiv(num_outputs, BLOCK), num_inputs // BLOCK)
    for rows in (weight, scale, out):
        assert rows.is_contiguous(), "rows follow each other"
    values, x_scale = groups_to_fp8(x)
    programs = {(m, n): triton.cdiv(num_rows, m) * triton.cdiv(num_outputs, n) for m, n in TILES}
    tile = tile or next((each for each in TILES if programs[each] >= MULTIPROCESSORS), TILES[-1])
    _multiply_blocks[(programs[tile],)](
        out, values, x_scale, weight, scale, weight if bias is None else bias, num_rows, num_outputs, num_inputs,
        TILE_M=tile[0], TILE_N=tile[1], BLOCK=BLOCK, NEIGHBOURS=_NEIGHBOURS, BIAS=bias is not None,
        num_warps=tile[0] // 16, num_stages=3,
    )  # fmt: skip


def groups_to_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x [M, K] in fp8 and the float32 scale [K / 128, M] of each group of 128 inputs of a row.

    NaN stays NaN, and infinity makes the numbers of its group NaN, as in `fp8.to_fp8`.
    """
    num_rows, num_inputs = x.shape
    assert x.stride(1) == 1, "rows are read in runs"
    assert num_inputs % BLOCK == 0, "groups are whole"
    num_groups = num_inputs // BLOCK
    values = torch.empty(num_rows, num_inputs, dtype=E4M3, device=x.device)
    scale = torch.empty(num_groups, num_rows, dtype=torch.float32, device=x.device)
    _groups_to_fp8[(num_rows, triton.cdiv(num_groups, _GROUPS))](
        values, scale, x, num_rows, x.stride(0), num_groups, GROUPS=_GROUPS, BLOCK=BLOCK, num_warps=4
    )
    return values, scale


@triton.jit(do_not_specialize=["num_rows"])
def _groups_to_fp8(
    values: tl.tensor,
    scale: tl.tensor,
    x: tl.tensor,
    num_rows: tl.tensor,
    x_stride: tl.tensor,
    num_groups: tl.tensor,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Grid (rows, groups / GROUPS)."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    at = group[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    is_own = group[:, None] < num_groups
    own = tl.load(x + row * x_stride + at, mask=is_own, other=0.0).to(tl.float32)
    own_scale = tl.maximum(tl.max(tl.abs(own), 1) / _LARGEST, _SMALLEST_SCALE)
    tl.store(scale + group.to(tl.int64) * num_rows + row, own_scale, mask=group < num_groups)
    rounded = (own / own_scale[:, None]).to(tl.float8e4nv)
    tl.store(values + row * num_groups * BLOCK + at, rounded, mask=is_own)


@triton.jit(do_not_specialize=["num_rows"])
def _multiply_blocks(
    out: tl.tensor,  # [M, N]
    x: tl.tensor,  # [M, K] fp8
    x_scale: tl.tensor,  # [K / BLOCK, M]
    weight: tl.tensor,  # [N, K] fp8
    scale: tl.tensor,  # [N / BLOCK, K / BLOCK]
    bias: tl.tensor,
    num_rows: tl.tensor,
    num_outputs: tl.tensor,
    num_inputs: tl.tensor,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,  # divides BLOCK
    BLOCK: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    BIAS: tl.constexpr,
) -> None:
    """Grid (rows / TILE_M * outputs / TILE_N). Programs of one tile of outputs and NEIGHBOURS tiles of rows follow each
    other. Rows beyond the end repeat the last one, and are not written."""
    tiles_m, tiles_n = tl.cdiv(num_rows, TILE_M), tl.cdiv(num_outputs, TILE_N)
    program = tl.program_id(0)
    first = program // (NEIGHBOURS * tiles_n) * NEIGHBOURS
    height = tl.minimum(tiles_m - first, NEIGHBOURS)
    within = program % (NEIGHBOURS * tiles_n)
    m = (first + within % height) * TILE_M + tl.arange(0, TILE_M)
    tile_n = within // height
    n = tile_n * TILE_N + tl.arange(0, TILE_N)
    k = tl.arange(0, BLOCK)
    read_m = tl.minimum(m, num_rows - 1)
    x_at = x + read_m[:, None].to(tl.int64) * num_inputs + k[None, :]
    weight_at = weight + tl.minimum(n, num_outputs - 1)[None, :].to(tl.int64) * num_inputs + k[:, None]
    num_blocks = num_inputs // BLOCK
    scale_at = scale + tile_n * TILE_N // BLOCK * num_blocks
    x_scale_at = x_scale + read_m
    total = tl.zeros([TILE_M, TILE_N], tl.float32)
    x_factor, factor = tl.load(x_scale_at), tl.load(scale_at)
    for block in tl.range(0, num_blocks):
        x_tile = tl.load(x_at + block * BLOCK)
        tile = tl.load(weight_at + block * BLOCK)
        is_next = block + 1 < num_blocks
        x_scale_at += tl.where(is_next, num_rows, 0)
        # The scales of the next step: those of this step were asked for while the one before computed.
        next_x_factor = tl.load(x_scale_at)
        next_factor = tl.load(scale_at + block + tl.where(is_next, 1, 0))
        total += tl.dot(x_tile, tile) * (x_factor * factor)[:, None]
        x_factor, factor = next_x_factor, next_factor
    if BIAS:
        total += tl.load(bias + n, mask=n < num_outputs, other=0.0).to(tl.float32)[None, :]
    out_at = out + m[:, None].to(tl.int64) * num_outputs + n[None, :]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=(m[:, None] < num_rows) & (n[None, :] < num_outputs))


@triton.jit
def add_dot(
    total: tl.tensor, tile: tl.tensor, x_tile: tl.tensor, factor_at: tl.tensor, SCALED: tl.constexpr
) -> tl.tensor:
    """Add weights [TILE_N, TILE_K] times x [TILE_K, ROWS], times a factor, to total. `factor_at` None: no factor."""
    if SCALED or factor_at is not None:
        tile = tile.to(tl.float32)  # directly to bfloat16, each weight would take an instruction of its own
    if factor_at is None:
        total = tl.dot(tile.to(x_tile.dtype), x_tile, total, input_precision="ieee")
    else:
        total += tl.dot(tile.to(x_tile.dtype), x_tile, input_precision="ieee") * tl.load(factor_at)
    return total
