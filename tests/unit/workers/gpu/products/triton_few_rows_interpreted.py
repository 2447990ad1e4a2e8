"""The kernels for few rows against float64, under Triton's interpreter. Run by test_triton_kernels.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.reference.triton_interpreter import convert_e4m3_as_gpus_do, let_scalars_end_ranges
from workers.gpu.e4m3 import E4M3
from workers.gpu.products import triton_blocks, tuning
from workers.gpu.products.few_rows import Scratch, multiply_few_rows
from workers.gpu.products.fp8 import BLOCK, to_fp8
from workers.gpu.products.int4 import from_int4, scale_of, to_int4
from workers.gpu.products.plan import Plan
from workers.gpu.products.product import Product
from workers.gpu.products.triton_blocks import TILES, groups_to_fp8, multiply_blocks
from workers.gpu.products.triton_int4 import dequantise
from workers.gpu.products.triton_rows import gate, rows_to_fp8

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)  # imported for its effect: unwritten memory holds NaN
let_scalars_end_ranges()
convert_e4m3_as_gpus_do()

VECTOR = Plan("vector", 4, 16, 4, 1)
VECTOR_PIPELINED = Plan("vector", 2, 32, 4, 4)
WORDS = Plan("words", 4, 16, 4, 1)
WORDS_PIPELINED = Plan("words", 2, 32, 4, 4)
MATRIX = Plan("matrix", 16, 16, 4, 4)
SPLIT = Plan("matrix", 32, 16, 4, 2, split=3)
WORDS_OF_BLOCKS = Plan("words", 32, 128, 4, 4)
MATRIX_OF_BLOCKS = Plan("matrix", 64, 128, 4, 4)
SPLIT_OF_BLOCKS = Plan("matrix", 64, 64, 4, 2, split=3)
NUM_OUTPUTS, NUM_COLUMNS = 64, 96
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def four_bits(
    num_outputs: int, num_inputs: int, group: int, has_zeros: bool, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random weights in 4 bits, their scale, and the same in float64."""
    numbers = torch.randint(16, (num_outputs, num_inputs // group, group), generator=generator)
    zeros = torch.randint(1, 17, (num_outputs, num_inputs // group), generator=generator)
    zeros = zeros if has_zeros else torch.full_like(zeros, 8)
    scales = (torch.rand(num_outputs, num_inputs // group, generator=generator) / 32 + 0.01).half()
    full = ((numbers - zeros[..., None]) * scales.double()[..., None]).flatten(1)
    scale = scale_of(scales, zeros, full)
    assert scale is not None
    return to_int4(full, scale), scale, full


def fp8_blocks(
    num_outputs: int, num_inputs: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random weights in fp8, the scales of their blocks, which differ widely, and the same in float64."""
    weight = torch.randn(num_outputs, num_inputs, generator=generator).to(E4M3)
    scale = torch.rand(-(-num_outputs // BLOCK), num_inputs // BLOCK, generator=generator) ** 4 + 0.01
    full = weight.double()
    for i, row in enumerate(scale.tolist()):
        for j, factor in enumerate(row):
            full[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK] *= factor
    return weight, scale, full


def product(
    plan: Plan,
    num_rows: int,
    dtype: torch.dtype,
    *,
    stored: str = "16 bits",
    has_bias: bool = False,
    has_residual: bool = False,
    is_gated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a kernel computes of random rows, which lie in a wider tensor, and the same in float64."""
    generator = torch.Generator().manual_seed(num_rows)
    num_outputs, num_inputs = NUM_OUTPUTS, NUM_COLUMNS
    if stored.startswith("4 bits"):  # of which the interpreter takes its time
        num_outputs, num_inputs = 2 * plan.tile_n, 8 * plan.tile_k * plan.split * (1 if plan.split > 1 else 2)
    if stored == "blocks":
        num_outputs, num_inputs = 3 * BLOCK // 2, 3 * BLOCK
    num_weights = 2 * num_outputs if is_gated else num_outputs
    x = torch.randn(num_rows, num_inputs + 8, generator=generator).to(dtype)[:, :num_inputs]
    weight = torch.randn(num_weights, num_inputs, generator=generator).to(dtype)
    full, scale = weight.double(), None
    if stored == "fp8":
        weight, scale = to_fp8(weight)
        full = weight.double() * scale.double()[:, None]
    elif stored == "blocks":
        weight, scale, full = fp8_blocks(num_weights, num_inputs, generator)
    elif stored != "16 bits":
        weight, scale, full = four_bits(num_weights, num_inputs, 32, "zero" in stored, generator)
    bias = torch.randn(num_weights, generator=generator).to(dtype) if has_bias else None
    residual = torch.randn(num_rows, num_outputs, generator=generator).to(dtype) if has_residual else None
    out = torch.empty(num_rows, num_outputs, dtype=dtype)
    scratch = Scratch(torch.device("cpu"))
    for _ in range(2):  # the second finds what the first left of its shares
        out.fill_(math.nan)
        multiply_few_rows(
            plan, x, weight, scale, bias, residual, out, scratch, is_gated=is_gated, dependent_launch=False
        )
        assert not scratch.ended.any()
    expected = x.double() @ full.T + (0 if bias is None else bias.double())
    if is_gated:
        gates, values = expected.chunk(2, -1)
        expected = gates * torch.sigmoid(gates) * values
    return out, expected + (0 if residual is None else residual.double())


@pytest.mark.parametrize("stored", ["16 bits", "fp8"])
@pytest.mark.parametrize(
    ("plan", "num_rows", "dtype"),
    [
        (VECTOR, 1, torch.bfloat16),
        (VECTOR_PIPELINED, 2, torch.float32),
        (WORDS, 1, torch.bfloat16),
        (WORDS_PIPELINED, 2, torch.float16),
        (MATRIX, 3, torch.float16),  # the interpreter's product takes the bits of bfloat16 as integers
        (SPLIT, 1, torch.float32),
        (SPLIT, 17, torch.float16),
    ],
    ids=lambda value: f"{value.kernel} {value.tile_n}" if isinstance(value, Plan) else str(value),
)
def test_products_are_right(plan: Plan, num_rows: int, dtype: torch.dtype, stored: str) -> None:
    out, expected = product(plan, num_rows, dtype, stored=stored, has_bias=num_rows % 2 == 1)
    assert (out.double() - expected).norm() / expected.norm() < TOLERANCE[dtype]


@pytest.mark.parametrize("stored", ["16 bits", "fp8"])
@pytest.mark.parametrize(
    ("plan", "num_rows"),
    [(VECTOR, 1), (WORDS_PIPELINED, 2), (MATRIX, 5), (SPLIT, 17)],
    ids=lambda value: value if isinstance(value, int) else f"{value.kernel} {value.tile_n}",
)
def test_gates_and_residuals_are_applied_before_rounding(plan: Plan, num_rows: int, stored: str) -> None:
    for options in ({"is_gated": True, "has_bias": num_rows == 2}, {"has_residual": True}):
        out, expected = product(plan, num_rows, torch.float16, stored=stored, **options)
        assert (out.double() - expected).norm() / expected.norm() < TOLERANCE[torch.float16]


@pytest.mark.parametrize(
    ("plan", "num_rows", "dtype", "stored", "options"),
    [
        (VECTOR, 1, torch.bfloat16, "4 bits with zero points", {"is_gated": True, "has_bias": True}),
        (VECTOR_PIPELINED, 2, torch.float32, "4 bits", {"has_residual": True}),
        (VECTOR_PIPELINED, 2, torch.float16, "4 bits with zero points", {"is_gated": True}),
        (MATRIX, 3, torch.float16, "4 bits", {"is_gated": True}),
        (SPLIT, 1, torch.float32, "4 bits with zero points", {"has_bias": True, "has_residual": True}),
        (SPLIT, 17, torch.float16, "4 bits", {"is_gated": True}),
    ],
    ids=lambda value: f"{value.kernel} {value.tile_n}" if isinstance(value, Plan) else str(value),
)
def test_products_of_weights_in_4_bits_are_right(
    plan: Plan, num_rows: int, dtype: torch.dtype, stored: str, options: dict[str, bool]
) -> None:
    out, expected = product(plan, num_rows, dtype, stored=stored, **options)
    assert (out.double() - expected).norm() / expected.norm() < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("plan", "num_rows", "dtype", "options"),
    [
        (WORDS_OF_BLOCKS, 1, torch.bfloat16, {"has_residual": True}),
        (WORDS_OF_BLOCKS, 2, torch.float32, {"is_gated": True, "has_bias": True}),
        (MATRIX_OF_BLOCKS, 16, torch.float16, {"is_gated": True}),
        (SPLIT_OF_BLOCKS, 1, torch.float32, {"has_bias": True, "has_residual": True}),
        (SPLIT_OF_BLOCKS, 64, torch.float32, {"is_gated": True}),
    ],
    ids=lambda value: value.kernel if isinstance(value, Plan) else str(value),
)
def test_products_of_few_rows_with_blocks_of_fp8_are_right(
    plan: Plan, num_rows: int, dtype: torch.dtype, options: dict[str, bool]
) -> None:
    """N is no multiple of a block, and values begin inside of one."""
    out, expected = product(plan, num_rows, dtype, stored="blocks", **options)
    assert (out.double() - expected).norm() / expected.norm() < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("num_rows", "num_outputs"), [(1, 256), (2, 200), (16, 200), (64, 256), (128, 200), (600, 200)]
)
def test_products_of_many_rows_with_blocks_of_fp8_are_right(num_rows: int, num_outputs: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    num_inputs = BLOCK if num_rows == 600 else 3 * BLOCK
    weight, scale, full = fp8_blocks(num_outputs, num_inputs, generator)
    x = torch.randn(num_rows, num_inputs + 8, generator=generator)[:, :num_inputs]
    x[0, :BLOCK] *= 1e4
    bias = torch.randn(num_outputs, generator=generator) if num_rows == 16 else None
    values, x_scale = groups_to_fp8(x)
    rounded = values.double() * x_scale.double().t().repeat_interleave(BLOCK, 1)
    assert (rounded - x).norm(dim=1).div(x.norm(dim=1)).max() < 0.04
    out = torch.full((num_rows, num_outputs), math.nan)
    multiply_blocks(x, weight, scale, bias, out, (64, 128) if num_rows == 600 else None)
    expected = rounded @ full.T + (0 if bias is None else bias.double())
    assert (out.double() - expected).norm() / expected.norm() < 1e-5


def test_tiles_of_products_of_many_rows_give_one_result() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, scale, _ = fp8_blocks(136, 2 * BLOCK, generator)
    x, results = torch.randn(66, 2 * BLOCK, generator=generator), []
    for tile in TILES:
        results.append(out := torch.full((66, 136), math.nan))
        multiply_blocks(x, weight, scale, None, out, tile)
    for each in results[1:]:
        torch.testing.assert_close(each, results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fault", ["none", "wrong", "no memory"])
def test_the_start_finds_out_whether_products_of_many_rows_with_blocks_of_fp8_work(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = Product(torch.randn(128, 128, generator=torch.Generator().manual_seed(0)).bfloat16())
    made.to_fp8(torch.full((1, 1), 0.01))

    def faulty(*arguments: Any) -> None:
        if fault == "no memory":
            raise RuntimeError("out of shared memory")
        arguments[4].fill_(1.0)

    if fault != "none":
        monkeypatch.setattr(triton_blocks, "multiply_blocks", faulty)
    monkeypatch.setattr(triton_blocks, "TILES", triton_blocks.TILES[-1:])
    monkeypatch.setattr(tuning, "can_scale", lambda *_: True)
    monkeypatch.setattr(tuning, "_CHECKED_ROWS", 5)
    works = tuning._can_multiply_blocks(made, torch.bfloat16, torch.device("cpu"))
    assert works == (fault == "none")
    expected = {"none": "", "wrong": "differs by", "no memory": "out of shared memory"}[fault]
    assert expected in caplog.text
    assert works or "128 x 128 weights in blocks of fp8 are dequantised" in caplog.text


def test_blocks_keep_what_is_not_a_number_in_its_row_and_output() -> None:
    weight, scale, _ = fp8_blocks(256, 256, torch.Generator().manual_seed(0))
    weight.view(torch.uint8)[7, 200] = 0x7F
    for num_rows, plan in ((2, WORDS_OF_BLOCKS), (5, MATRIX_OF_BLOCKS), (5, None)):
        x, out = torch.ones(num_rows, 256), torch.zeros(num_rows, 256)
        x[1, 5] = math.nan
        if plan is None:
            multiply_blocks(x, weight, scale, None, out)
        else:
            multiply_few_rows(
                plan, x, weight, scale, None, None, out, Scratch(x.device), is_gated=False,
                dependent_launch=False,
            )  # fmt: skip
        assert out[1].isnan().all()
        assert out[:, 7].isnan().all()
        out[1], out[:, 7] = 0.0, 0.0
        assert out.isfinite().all()


@pytest.mark.parametrize("group", [32, 576], ids=["groups", "channels"])
def test_weights_in_4_bits_become_wide(group: int) -> None:
    for has_zeros in (False, True):
        weight, scale, _ = four_bits(20, 576, group, has_zeros, torch.Generator().manual_seed(0))
        assert torch.equal(dequantise(weight, scale, torch.float16), from_int4(weight, scale, torch.float16))


def test_gates_of_many_rows_are_right() -> None:
    x = torch.randn(70, 2 * 2100, generator=torch.Generator().manual_seed(0))
    gate(x, out := torch.empty(70, 2100), dependent_launch=False)
    gates, values = x.double().chunk(2, -1)
    torch.testing.assert_close(out.double(), gates * torch.sigmoid(gates) * values, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("plan", "num_rows"), [(VECTOR, 2), (SPLIT, 5)], ids=["vector", "matrix"])
def test_numbers_that_are_not_finite_stay_in_their_row_and_output(plan: Plan, num_rows: int) -> None:
    x, weight = torch.ones(num_rows, NUM_COLUMNS), torch.ones(NUM_OUTPUTS, NUM_COLUMNS)
    x[1, 5], weight[7, 90] = math.nan, math.inf
    out = torch.empty(num_rows, NUM_OUTPUTS)
    multiply_few_rows(plan, x, weight, None, None, None, out, Scratch(x.device), is_gated=False, dependent_launch=False)
    assert out[1].isnan().all()
    assert out[0, 7] == math.inf
    assert (out[0, torch.arange(NUM_OUTPUTS) != 7] == NUM_COLUMNS).all()


def test_rows_become_fp8_as_weights_do() -> None:
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-30, 1e-3, 1, 1e3, 0])[:, None]
    values, scale = rows_to_fp8(x[:, :40])
    expected, expected_scale = to_fp8(x[:, :40])
    assert scale.shape == (5, 1)
    torch.testing.assert_close(scale[:, 0], expected_scale)
    assert values.dtype == E4M3
    assert (values.float() - expected.float()).abs().max() <= 32  # a tie between two neighbours, at most
    assert (values.float() == expected.float()).float().mean() > 0.98


@pytest.mark.parametrize("is_gated", [False, True], ids=["plain", "gates"])
def test_a_row_of_results_without_a_row_of_x_becomes_zero(is_gated: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, NUM_COLUMNS, generator=generator).bfloat16()
    weight, scale = to_fp8(torch.randn(NUM_OUTPUTS, NUM_COLUMNS, generator=generator))
    out = torch.full((2, NUM_OUTPUTS // (2 if is_gated else 1)), math.nan, dtype=torch.bfloat16)
    alone = torch.empty_like(out[:1])
    scratch = Scratch(torch.device("cpu"))
    for result in (out, alone):
        multiply_few_rows(
            WORDS, x, weight, scale, None, None, result, scratch, is_gated=is_gated, dependent_launch=False
        )
    assert torch.equal(out[:1], alone)
    assert torch.equal(out[1], torch.zeros_like(out[1]))


def test_rows_that_no_wide_read_may_begin_at_are_copied_first() -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(2, NUM_COLUMNS + 3, generator=generator).bfloat16()
    weight, scale = to_fp8(torch.randn(NUM_OUTPUTS, NUM_COLUMNS, generator=generator))
    expected = wide[:, 1 : NUM_COLUMNS + 1].double() @ (weight.double() * scale.double()[:, None]).T
    out = torch.empty(2, NUM_OUTPUTS, dtype=torch.bfloat16)
    multiply_few_rows(
        WORDS, wide[:, 1 : NUM_COLUMNS + 1], weight, scale, None, None, out, Scratch(torch.device("cpu")),
        is_gated=False, dependent_launch=False,
    )  # fmt: skip
    assert (out.double() - expected).norm() / expected.norm() < TOLERANCE[torch.bfloat16]
