"""Products of one row or two with weights of 8 or 16 bits, which are read four at a time, as words.

At the memory's rate an H200 brings 19 fp8 weights to each multiprocessor in a clock, and a multiprocessor executes 128
instructions of single threads in that time. So a weight may take six of them at most. Of fp8 tiles, the compiler would
take every byte out of its register and put it back again. Of a word, two instructions of the device make two pairs of
numbers, which is one and a half instructions for a weight, and one more for each row.

A program reads its weights through shared memory. Before it waits for the kernel in front, it asks for its first
weights in the device's L2 cache.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from workers.gpu.products.triton_few_rows import _finish
from workers.gpu.products.triton_prefetch import prefetch_rows

_UNPACK: Final = tl.constexpr("""{
    .reg .b16 low, high, a, b, c, d;
    .reg .b32 ab, cd;
    mov.b32 {low, high}, $4;
    cvt.rn.f16x2.e4m3x2 ab, low;
    cvt.rn.f16x2.e4m3x2 cd, high;
    mov.b32 {a, b}, ab;
    mov.b32 {c, d}, cd;
    cvt.f32.f16 $0, a;
    cvt.f32.f16 $1, b;
    cvt.f32.f16 $2, c;
    cvt.f32.f16 $3, d;
}""")


@triton.jit
def _weight(words: tl.tensor, J: tl.constexpr) -> tl.tensor:
    """Byte J of each word as float32. As the upper bits of a float32 it is the number times 2^-120, exactly."""
    byte = words >> (8 * J)
    bits = ((byte & 0x80) << 24) | ((byte & 0x7F) << 20)
    number = bits.to(tl.float32, bitcast=True) * (2.0**120)
    return tl.where((byte & 0x7F) == 0x7F, float("nan"), number)


@triton.jit
def four_weights(words: tl.tensor, dtype: tl.constexpr, NATIVE: tl.constexpr) -> tl.tensor:
    """The four numbers of `dtype` in each word, int32 or int64, as float32, from the lowest on. NATIVE: fp8 by the
    device's own instruction, which compute capability 8.9 and later have."""
    if dtype.primitive_bitwidth == 16:
        four = _four_halves(words, dtype)
    elif NATIVE:
        four = tl.inline_asm_elementwise(
            _UNPACK, "=f,=f,=f,=f,r", [words], dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True,
            pack=1,
        )  # fmt: skip
    else:
        four = _weight(words, 0), _weight(words, 1), _weight(words, 2), _weight(words, 3)
    return four


@triton.jit
def _input(half: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """The lower 16 bits of an int32, a number of `dtype`, as float32."""
    if dtype == tl.bfloat16:
        return (half << 16).to(tl.float32, bitcast=True)
    return half.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _four_halves(four: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """The four numbers of `dtype`, of 16 bits, in each int64, as float32."""
    low = four.to(tl.int32)
    high = (four >> 32).to(tl.int32)
    return _input(low, dtype), _input(low >> 16, dtype), _input(high, dtype), _input(high >> 16, dtype)


@triton.jit
def four_inputs(row: tl.tensor, words: tl.tensor) -> tl.tensor:
    """Numbers 4 w to 4 w + 3 of `row` for each w of `words`, as float32. Four numbers of 16 bits are read at once, so
    their addresses must be multiples of 8 bytes."""
    if row.dtype.element_ty.primitive_bitwidth == 32:
        at = row + words * 4
        return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    return _four_halves(tl.load(row.to(tl.pointer_type(tl.int64)) + words), row.dtype.element_ty)


@triton.jit
def _add_products(
    total: tl.tensor, w0: tl.tensor, w1: tl.tensor, w2: tl.tensor, w3: tl.tensor,
    x0: tl.tensor, x1: tl.tensor, x2: tl.tensor, x3: tl.tensor, factor: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """Add the products of four planes of weights [N, W] with inputs [1, W] to total [N, W]. With a `factor` [W / 4] of
    runs, total is [N, W / 4]: a thread reads a run of four words at once, and sums its products before it scales them.
    """
    sums = total if factor is None else tl.zeros_like(w0)
    sums += w0 * x0
    sums += w1 * x1
    sums += w2 * x2
    sums += w3 * x3
    if factor is None:
        total = sums
    else:
        total += tl.sum(tl.reshape(sums, [total.shape[0], total.shape[1], 4]), 2) * factor[None, :]
    return total


@triton.jit
def _block_scale(
    scale: tl.tensor, n: tl.tensor, num_inputs: tl.tensor, begin: tl.tensor, RUNS: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """The scales of RUNS runs of 16 inputs of output n, from word `begin` on, [RUNS]."""
    block = (begin // 4 + tl.arange(0, RUNS)) // (BLOCK // 16)
    return tl.load(scale + n // BLOCK * (num_inputs // BLOCK) + block)


@triton.jit
def _words(
    out: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    x_stride: tl.tensor,
    num_outputs: tl.tensor,  # of `out`
    num_inputs: tl.tensor,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    STAGES: tl.constexpr,
    TWO_ROWS: tl.constexpr,
    PADDING: tl.constexpr,  # whether a second row of results becomes zero
    GATED: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK: tl.constexpr,  # outputs and inputs of a block with one scale, which TILE_N divides; 0 = another format
    LINES: tl.constexpr,  # of a row of weights that a program prefetches; 0 = none
    DEPENDENT_LAUNCH: tl.constexpr,
) -> None:
    """Grid (outputs / TILE_N). One row of x, or two."""
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    words = tl.arange(0, TILE_K // 4)[None, :]
    row_at = weight + n[:, None].to(tl.int64) * num_inputs
    if DEPENDENT_LAUNCH:
        if LINES:
            prefetch_rows(row_at, num_inputs, LINES)
            if GATED:
                prefetch_rows(row_at + num_outputs.to(tl.int64) * num_inputs, num_inputs, LINES)
        gdc_wait()
        gdc_launch_dependents()
    dtype: tl.constexpr = weight.dtype.element_ty
    WORD: tl.constexpr = tl.int32 if dtype.primitive_bitwidth == 8 else tl.int64
    weight_at = row_at.to(tl.pointer_type(WORD)) + words
    values_at = weight_at + num_outputs.to(tl.int64) * (num_inputs // 4)
    RUNS: tl.constexpr = TILE_K // 16
    first = tl.program_id(0) * TILE_N
    total = tl.zeros([TILE_N, RUNS if BLOCK else TILE_K // 4], tl.float32)
    total2 = total
    values_total = total
    values_total2 = total
    for begin in tl.range(0, num_inputs // 4, TILE_K // 4, num_stages=STAGES):
        w0, w1, w2, w3 = four_weights(tl.load(weight_at + begin, eviction_policy="evict_first"), dtype, NATIVE)
        x0, x1, x2, x3 = four_inputs(x, begin + words)
        block_scale = _block_scale(scale, first, num_inputs, begin, RUNS, BLOCK) if BLOCK else None
        total = _add_products(total, w0, w1, w2, w3, x0, x1, x2, x3, block_scale)
        if TWO_ROWS:
            y0, y1, y2, y3 = four_inputs(x + x_stride, begin + words)
            total2 = _add_products(total2, w0, w1, w2, w3, y0, y1, y2, y3, block_scale)
        if GATED:
            w0, w1, w2, w3 = four_weights(tl.load(values_at + begin, eviction_policy="evict_first"), dtype, NATIVE)
            block_scale = _block_scale(scale, num_outputs + first, num_inputs, begin, RUNS, BLOCK) if BLOCK else None
            values_total = _add_products(values_total, w0, w1, w2, w3, x0, x1, x2, x3, block_scale)
            if TWO_ROWS:
                values_total2 = _add_products(values_total2, w0, w1, w2, w3, y0, y1, y2, y3, block_scale)
    result = _finish(
        tl.sum(total, 1), tl.sum(values_total, 1), scale, bias, residual + n, n, num_outputs, None,
        GATED, SCALED, BIAS, RESIDUAL,
    )  # fmt: skip
    tl.store(out + n, result.to(out.dtype.element_ty))
    if PADDING:
        tl.store(out + num_outputs + n, tl.zeros([TILE_N], out.dtype.element_ty))
    if TWO_ROWS:
        at = num_outputs + n
        result = _finish(
            tl.sum(total2, 1), tl.sum(values_total2, 1), scale, bias, residual + at, n, num_outputs,
            None, GATED, SCALED, BIAS, RESIDUAL,
        )  # fmt: skip
        tl.store(out + at, result.to(out.dtype.element_ty))
