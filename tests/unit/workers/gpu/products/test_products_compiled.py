"""The kernels of products, compiled for a GPU on a machine without one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from tests.reference.compiled_kernels import Launches, spilled_bytes, waits_before_it_lets_others_start
from workers.gpu.e4m3 import E4M3
from workers.gpu.products import few_rows, triton_blocks, triton_int4, triton_rows
from workers.gpu.products.fp8 import BLOCK, to_fp8
from workers.gpu.products.plan import MAX_ROWS, ROW_CLASSES, VECTOR_ROWS, Plan, candidates

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def ptx_of(plan: Plan, num_rows: int, weight: torch.Tensor, scale: torch.Tensor | None, *, is_gated: bool) -> str:
    """What the launch of a product would run."""
    name = "_words" if plan.kernel == "words" else f"_{plan.kernel}"
    kernel = Launches(getattr(few_rows, name))
    num_outputs = weight.shape[0] // 2 if is_gated else weight.shape[0]
    num_inputs = weight.shape[1] * (8 if weight.dtype == torch.int32 else 1)
    x = torch.empty(num_rows, num_inputs, dtype=torch.bfloat16)
    out = torch.empty(num_rows, num_outputs, dtype=torch.bfloat16)
    residual = None if is_gated else torch.empty_like(out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_rows, name, kernel)
        patch.setattr(few_rows, "converts_fp8", lambda _: True)
        few_rows.multiply_few_rows(
            plan, x, weight, scale, None, residual, out, few_rows.Scratch(x.device), is_gated=is_gated,
            dependent_launch=True,
        )  # fmt: skip
    return kernel.ptx()


@pytest.mark.parametrize("is_fp8", [False, True], ids=["16 bits", "fp8"])
@pytest.mark.parametrize("is_gated", [False, True], ids=["residual", "gates"])
def test_plans_compile_read_in_wide_runs_and_wait_in_the_right_order(is_gated: bool, is_fp8: bool) -> None:
    weight = torch.randn(8192, 2048).bfloat16()
    weight, scale = to_fp8(weight) if is_fp8 else (weight, None)
    for rows in ROW_CLASSES:
        for plan in candidates(rows, 8192, 2048, weight.itemsize, is_gated=is_gated):
            ptx = ptx_of(plan, rows, weight, scale, is_gated=is_gated)
            assert waits_before_it_lets_others_start(ptx), plan
            if rows > VECTOR_ROWS:
                assert "wgmma.mma_async" in ptx, plan
                assert "cp.async." in ptx, f"{plan} does not read ahead"
            elif plan.stages == 1:
                assert "evict_first.v4" in ptx or "evict_first.L2::cache_hint.v4" in ptx, f"{plan} reads narrowly"
                first_weights = ptx.find("evict_first")
                assert 0 < first_weights < ptx.find("griddepcontrol.wait"), f"{plan} waits before it asks for weights"
            elif plan.kernel == "words":
                assert 0 < ptx.find("prefetch.global.L2") < ptx.find("griddepcontrol.wait"), plan
                assert re.search(r"cp\.async\.cg\.shared\.global [^;]*0x10", ptx), f"{plan} reads narrowly"
                assert ("cvt.rn.f16x2.e4m3x2" in ptx) == is_fp8
                loop = ptx.partition("griddepcontrol.wait")[2].partition("shfl.sync")[0]
                assert not re.search(r"ld\.shared\.[bu](8|16)", loop), f"{plan} reads single numbers"


@pytest.mark.parametrize(("is_gated", "group"), [(False, 32), (True, 128)], ids=["residual", "gates"])
def test_plans_for_4_bits_compile_and_move_no_numbers_between_threads(is_gated: bool, group: int) -> None:
    weight, scale = torch.zeros(8192, 256, dtype=torch.int32), torch.ones(1 + is_gated, 8192, 2048 // group).half()
    rows = VECTOR_ROWS if is_gated else MAX_ROWS  # up to VECTOR_ROWS, plans are for both kernels
    for plan in candidates(rows, 8192, 256, weight.itemsize, is_gated=is_gated, group=group):
        if plan.split > 1:
            continue
        ptx = ptx_of(plan, rows, weight, scale, is_gated=is_gated)
        assert waits_before_it_lets_others_start(ptx), plan
        assert ("wgmma.mma_async" in ptx) == (plan.kernel == "matrix"), plan
        assert not re.search(r"ldmatrix[.\w]+x4\.shared", ptx), f"{plan} moves numbers between threads"
        assert ("cp.async." in ptx) == (plan.stages > 1), plan
        assert re.search(r"evict_first(\.L2::cache_hint)?\.v4", ptx) or plan.stages > 1, f"{plan} reads narrowly"
        loop = ptx.partition("griddepcontrol.wait")[2].partition("shfl.sync")[0]  # without the last sums
        assert not re.search(r"cvt\.rn\.\w+\.[su](8|16|32)", loop), f"{plan} converts integers one by one"
        assert not re.search(r"ld\.shared\.[bu](8|16)", loop), f"{plan} reads single numbers of x or weights"


@pytest.mark.parametrize("is_gated", [False, True], ids=["residual", "gates"])
def test_plans_for_blocks_of_fp8_move_no_sums_between_threads_and_hardly_spill_registers(
    is_gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, scale = torch.zeros(4096, 2048, dtype=E4M3), torch.ones(4096 // BLOCK, 2048 // BLOCK)
    for rows in (VECTOR_ROWS, MAX_ROWS // 2):
        for plan in candidates(rows, 4096, 2048, 1, is_gated=is_gated, block=BLOCK):
            if plan.split > 2:
                continue
            ptx = ptx_of(plan, 1 if plan.kernel == "words" else rows, weight, scale, is_gated=is_gated)
            assert spilled_bytes(ptx) <= 16, plan  # the assembler may prefer a spill of a few registers to more of them
            assert waits_before_it_lets_others_start(ptx), plan
            loop = ptx.partition("griddepcontrol.wait")[2].partition("shfl.sync")[0]
            assert plan.kernel == "matrix" or "st.shared" not in loop, f"{plan} moves sums between threads"


@pytest.mark.parametrize(("num_rows", "num_outputs"), [(4096, 4096), (300, 4096), (200, 4096), (65, 576)])
def test_products_of_many_rows_with_blocks_of_fp8_use_the_matrix_units_in_fp8(num_rows: int, num_outputs: int) -> None:
    """The four take the four tiles."""
    weight, scale = torch.empty(num_outputs, 512, dtype=E4M3), torch.empty(-(-num_outputs // BLOCK), 512 // BLOCK)
    x, out = torch.empty(num_rows, 512).bfloat16(), torch.empty(num_rows, num_outputs).bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_blocks, "_groups_to_fp8", rounding := Launches(triton_blocks._groups_to_fp8))
        patch.setattr(triton_blocks, "_multiply_blocks", product := Launches(triton_blocks._multiply_blocks))
        triton_blocks.multiply_blocks(x, weight, scale, None, out)
    assert "e4m3x2" in rounding.ptx()
    ptx = product.ptx()
    tile_m, tile_n = {4096: (128, 128), 300: (64, 128), 200: (64, 64), 65: (64, 32)}[num_rows]
    assert f"wgmma.mma_async.sync.aligned.m64n{tile_n}k32.f32.e4m3.e4m3" in ptx
    assert f".reqntid {2 * tile_m}" in ptx
    assert "cp.async." in ptx, "does not read ahead"
    assert spilled_bytes(ptx) == 0


def test_kernels_of_many_rows_compile() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_rows, "_gate", gates := Launches(triton_rows._gate))
        patch.setattr(triton_rows, "_rows_to_fp8", rounding := Launches(triton_rows._rows_to_fp8))
        x = torch.empty(300, 4096, dtype=torch.bfloat16)
        triton_rows.gate(x, torch.empty(300, 2048, dtype=torch.bfloat16), dependent_launch=True)
        triton_rows.rows_to_fp8(x)
        patch.setattr(triton_int4, "_dequantise", widening := Launches(triton_int4._dequantise))
        triton_int4.dequantise(torch.empty(64, 256, dtype=torch.int32), torch.empty(2, 64, 16).half(), torch.bfloat16)
    assert "bf16" in widening.ptx()
    assert waits_before_it_lets_others_start(gates.ptx())
    assert "e4m3x2" in rounding.ptx()
