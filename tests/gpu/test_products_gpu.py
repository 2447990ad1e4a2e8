"""The products of few rows on a CUDA device: every plan that may be chosen, alone and behind other kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from workers.gpu.products.fp8 import BLOCK, from_fp8, has_blocks
from workers.gpu.products.int4 import from_int4, group_of
from workers.gpu.products.multiply import (
    can_scale,
    chosen,
    key_of,
    multiply,
    only_first_row_counts,
    run_plan,
)
from workers.gpu.products.plan import ROW_CLASSES, VECTOR_ROWS, Plan, candidates
from workers.gpu.products.product import Product
from workers.gpu.products.triton_blocks import TILES, multiply_blocks
from workers.gpu.products.triton_int4 import dequantise
from workers.gpu.products.tuning import KeptPlans, choose_plans, error_of

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
SYMMETRIC, ASYMMETRIC, CHANNELS = "4 bits", "4 bits with zero points", "4 bits by channel"
BLOCKS = "fp8 in blocks"
FORMATS = ["16 bits", "fp8", BLOCKS, SYMMETRIC, ASYMMETRIC, CHANNELS]
SHAPES = [(3072, 2048), (4096, 14336), (960, 576), (1024, 4096)]  # outputs, inputs


def make_product(
    num_outputs: int, num_inputs: int, stored: str, *, has_bias: bool = False, dtype: torch.dtype = torch.bfloat16
) -> Product:
    if stored == BLOCKS:
        num_inputs += -num_inputs % BLOCK
    weight = torch.randn(num_outputs, num_inputs, device=CUDA).mul_(num_inputs**-0.5).to(dtype)
    product = Product(weight, torch.randn(num_outputs, device=CUDA).to(dtype) if has_bias else None)
    if stored == "fp8":
        product.to_fp8()
    elif stored == BLOCKS:
        shape = -(-num_outputs // BLOCK), num_inputs // BLOCK
        product.to_fp8((torch.rand(shape, device=CUDA) + 0.5) * num_inputs**-0.5 / 64)
    elif stored != "16 bits":
        group = num_inputs if stored == CHANNELS else 64
        scale = torch.rand(1 if stored == SYMMETRIC else 2, num_outputs, num_inputs // group, device=CUDA).add_(0.5)
        scale[0].mul_(num_inputs**-0.5 / 4)
        scale[1:].mul_(12).round_()
        product.to_int4(scale.half())
    return product


def plans_of(product: Product, rows: int, *, is_gated: bool = False) -> list[Plan]:
    weight, group = product.weight, group_of(product.weight, product.scale)
    block = BLOCK if has_blocks(product.scale) else 0
    return candidates(rows, *weight.shape, weight.itemsize, is_gated=is_gated, group=group, block=block)


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
@torch.inference_mode()
def test_every_candidate_is_right_for_all_its_numbers_of_rows(num_outputs: int, num_inputs: int, stored: str) -> None:
    product = make_product(num_outputs, num_inputs, stored, has_bias=num_outputs == 1024)
    for rows in ROW_CLASSES:
        plans = plans_of(product, rows)
        for plan in plans:
            for num_rows in {1, rows} | ({3, rows - 1} if rows > VECTOR_ROWS else set()):
                assert error_of(plan, product, torch.bfloat16, num_rows) < 4e-3, (plan, num_rows)
    assert plans_of(product, VECTOR_ROWS) or num_inputs == 576


@pytest.mark.parametrize("stored", FORMATS)
@torch.inference_mode()
def test_every_candidate_applies_gates_and_residuals(stored: str) -> None:
    product = make_product(4096, 2048, stored)
    weight, scale = product.weight, product.scale
    for rows in ROW_CLASSES:
        for plan in plans_of(product, rows, is_gated=True):
            assert error_of(plan, product, torch.bfloat16, rows, is_gated=True) < 4e-3, plan
        x, residual = (torch.randn(rows, width, device=CUDA).bfloat16() for width in (2048, 4096))
        for plan in plans_of(product, rows):
            result = run_plan(plan, x, weight, scale, None, residual).float()
            expected = run_plan(plan, x, weight, scale).float() + residual.float()
            assert (result - expected).norm() / expected.norm() < 4e-3, plan
    assert error_of(None, product, torch.bfloat16, 300, is_gated=True) < (0.05 if "fp8" in stored else 1e-2)


@torch.inference_mode()
def test_a_second_row_without_x_becomes_zero() -> None:
    product = make_product(4096, 2048, "fp8")
    x = torch.randn(2, 2048, device=CUDA).bfloat16()
    for plan in plans_of(product, VECTOR_ROWS):
        both = run_plan(plan, x, product.weight, product.scale)
        with only_first_row_counts(True):
            first = run_plan(plan, x, product.weight, product.scale, out=torch.full_like(both, torch.nan))
        assert (first[0].float() - both[0].float()).norm() / both[0].float().norm() < 4e-3
        assert not first[1].any()


@torch.inference_mode()
def test_float16_and_float32_are_right() -> None:
    for dtype, tolerance in ((torch.float16, 1e-3), (torch.float32, 1e-5)):
        product = make_product(1024, 4096, "16 bits", dtype=dtype)
        for plan in (Plan("vector", 4, 512, 4, 4), Plan("matrix", 64, 64, 4, 2, split=2)):
            assert error_of(plan, product, dtype, 2) < tolerance


@pytest.mark.parametrize("stored", FORMATS)
@torch.inference_mode()
def test_a_chain_of_products_gives_the_same_bits_in_every_replay(stored: str) -> None:
    """Each product starts before the one in front has ended. If it read too early, replays would differ."""
    products = [make_product(2048, 2048, stored) for _ in range(12)]
    for rows, is_split in ((2, False), (16, True)):
        plan = next(plan for plan in plans_of(products[0], rows) if (plan.split > 1) == is_split)
        x = torch.randn(rows, 2048, device=CUDA).bfloat16()

        def chain(x: torch.Tensor = x, plan: Plan = plan) -> torch.Tensor:
            for each in products:
                x = run_plan(plan, x, each.weight, each.scale, each.bias)
            return x

        expected = x
        for each in products:
            expected = run_plan(plan, expected, each.weight, each.scale, each.bias)
            torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = chain()
        for _ in range(50):
            result.fill_(torch.nan)
            graph.replay()
            assert torch.equal(result, expected)


@torch.inference_mode()
def test_weights_in_4_bits_become_wide_as_plain_torch_makes_them() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        product = make_product(1000, 576, ASYMMETRIC, dtype=dtype)
        weight, scale = product.weight, product.scale
        assert scale is not None
        assert torch.equal(dequantise(weight, scale, dtype), from_int4(weight, scale, dtype))


@pytest.mark.parametrize("stored", ["fp8", BLOCKS])
@torch.inference_mode()
def test_many_rows_in_fp8_are_near_their_product_in_float32(stored: str) -> None:
    product = make_product(1024 if stored == "fp8" else 1000, 2048, stored, has_bias=True)
    x = torch.randn(300, 2048, device=CUDA).bfloat16()
    x[7] *= 1e-4
    assert product.scale is not None
    assert product.bias is not None
    assert can_scale(product.weight, product.scale, x.dtype, CUDA)
    assert multiply(x[:0], product.weight, product.scale).shape == (0, product.out_features)
    result = multiply(x, product.weight, product.scale, product.bias)
    full = from_fp8(product.weight, product.scale, torch.float32)
    expected = torch.nn.functional.linear(x.float(), full, product.bias.float())
    error = (result.float() - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < 0.05


@torch.inference_mode()
def test_all_tiles_of_products_with_blocks_of_fp8_agree() -> None:
    product = make_product(2000, 2048, BLOCKS)
    x = torch.randn(700, 2048, device=CUDA).bfloat16()
    assert product.scale is not None
    results = [x.new_full((700, 2000), torch.nan) for _ in TILES]
    for tile, out in zip(TILES, results, strict=True):
        multiply_blocks(x, product.weight, product.scale, None, out, tile)
        error = (out.float() - results[0].float()).norm() / results[0].float().norm()
        assert error < 4e-3, tile


@torch.inference_mode()
def test_plans_are_measured_once_and_read_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    products = [make_product(2048, 2048, "fp8") for _ in range(8)]
    key = key_of(products[0].weight, products[0].scale, torch.bfloat16, VECTOR_ROWS)
    chosen.clear()
    choose_plans(products, torch.bfloat16, 2, CUDA, tmp_path)
    first = chosen[key]  # reads half the bytes of the vendor's fp8 product, whose least number of rows is higher
    assert key in KeptPlans(tmp_path, CUDA)
    chosen.clear()

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("workers.gpu.products.tuning._fastest", fail)
    choose_plans(products, torch.bfloat16, 2, CUDA, tmp_path)
    assert chosen == {key: first}
    chosen.clear()
