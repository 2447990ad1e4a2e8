"""The table of a step's kernels, from made-up profiles."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.bench.kernel_table import KernelRow, kernel_table, short_name
from pipeline.bench.report import print_kernels
from pipeline.bench.roofline import ModelShape, WeightFormat

# Two layers: products of 4 x 8, 4 x 4, 4 x 12 and 6 x 4 weights of 2 bytes; a head of 4 x 10; 16 bytes a token in KV.
SHAPE = ModelShape(
    hidden_size=4, intermediate_size=6, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=2, vocab_size=10,
    bytes_per_value=2, layer_weights=WeightFormat(bits=16), bytes_per_kv_value=2,
)  # fmt: skip
LAYER = [
    ["nvjet_small", 2.0], ["_write_kv", 0.5], ["decode", 3.0], ["combine", 1.0], ["nvjet_small", 2.0],
    ["triton_red_fused_add_mm_mul_0", 0.5], ["_matrix", 4.0], ["gemvx", 3.0],
    ["cublasLt::splitKreduce_kernel", 1.0],
]  # fmt: skip
STEP = [["_write_time", 0.25], *LAYER, *LAYER, ["nvjet_large", 5.0], ["_finish_rows", 1.0], ["_write_time", 0.25]]


def profile_of(launches: list[Any]) -> dict[str, Any]:
    return {
        "num_steps": 4, "window_us": 200.0, "busy_us": 180.0,
        "load": {"num_seqs": 3, "num_tokens": 3, "num_kv_read": 15},
        "kernels": [[name, 4, 9.0, 4 * us] for name, us in launches],
        "typical_step": {"num_steps": 4, "num_alike": 3, "launches": launches},
    }  # fmt: skip


def by_label(rows: list[KernelRow]) -> dict[tuple[str, str], tuple[float, float, float | None]]:
    return {(row.what, row.name): (row.launches, row.us, row.num_bytes) for row in rows}


def test_products_are_told_apart_by_their_place_and_have_the_bytes_of_their_weights() -> None:
    table = kernel_table(profile_of(STEP), SHAPE)
    rows = by_label(table.rows)
    assert rows["query, key, value", "nvjet_small"] == (2, 4, 2 * 2 * 32)
    assert rows["output", "nvjet_small"] == (2, 4, 2 * 2 * 16)
    assert rows["gate, up", "_matrix"] == (2, 8, 2 * 2 * 48)
    assert rows["down", "gemvx"] == (2, 6, 2 * 2 * 24)
    assert rows["down: sum of parts", "cublasLt::splitKreduce_kernel"] == (2, 2, None)
    assert rows["head", "nvjet_large"] == (1, 5, 80)
    assert rows["attention", "decode"] == (2, 6, 15 * 16)
    assert rows["attention", "combine"] == (2, 2, None)
    assert rows["others", "triton_red_fused_add_mm_mul_0"] == (2, 1, None)
    assert [row.us for row in table.rows] == sorted((row.us for row in table.rows), reverse=True)
    groups = by_label(table.groups)
    assert groups["products", ""] == (10, 24, 2 * 2 * 120)
    assert groups["attention", ""] == (4, 8, 240)
    assert sum(row.us for row in table.groups) == pytest.approx(sum(us for _, us in STEP))
    assert (table.busy_us, table.step_us) == (45, 50)


@pytest.mark.parametrize(
    ("module", "kernels"),
    [
        ("attention/triton_decode", ["decode", "combine"]),
        ("attention/triton_prefill", ["prefill"]),
        ("products/triton_few_rows", ["_vector", "_matrix"]),
        ("products/triton_words", ["_words"]),
    ],
)
def test_our_own_kernels_still_have_the_names_that_the_table_knows(module: str, kernels: list[str]) -> None:
    source = (Path(__file__).parents[4] / "workers" / "gpu" / f"{module}.py").read_text()
    for kernel in kernels:
        assert f"\ndef {kernel}(\n" in source
        profile = profile_of([[kernel, 1.0]])
        assert kernel_table(profile, None).groups[0].group != "others"


def test_products_that_were_not_fused_are_found_as_well() -> None:
    kinds = [[f"nvjet_{i}", 1.0] for i in "qkvogud"]
    rows = by_label(kernel_table(profile_of([*kinds, *kinds, ["nvjet_head", 9.0]]), SHAPE).rows)
    assert rows["query, key, value", "nvjet_k"] == (2, 2, None)  # which share of the bytes is its own is not known
    assert rows["down", "nvjet_d"] == (2, 2, 2 * 2 * 24)
    assert rows["head", "nvjet_head"] == (1, 9, 80)


@pytest.mark.parametrize("has_order", [True, False])
def test_products_of_unknown_places_share_the_bytes_of_all_weights(has_order: bool) -> None:
    profile = profile_of([*STEP, ["nvjet_large", 2.0]])
    if not has_order:
        del profile["typical_step"]
    table = kernel_table(profile, SHAPE)
    assert {row.what for row in table.rows} == {"products and head", "attention", "others"}
    assert all(row.num_bytes is None for row in table.rows if row.name.startswith("nvjet"))
    assert by_label(table.groups)["products and head", ""][2] == SHAPE.weight_bytes


def test_without_a_shape_there_are_times_and_no_bytes() -> None:
    table = kernel_table(profile_of(STEP), None)
    assert all(row.num_bytes is None for row in [*table.rows, *table.groups])
    assert by_label(table.rows)["attention", "decode"] == (2, 6, None)


def test_fp8_weights_and_an_fp8_cache_are_fewer_bytes() -> None:
    shape = ModelShape.from_config(
        {
            "model_type": "llama", "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 2, "vocab_size": 10,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2,
        },
        "bfloat16", "fp8", "fp8_e4m3",
    )  # fmt: skip
    rows = by_label(kernel_table(profile_of(STEP), shape).rows)
    assert rows["gate, up", "_matrix"][2] == 2 * (48 + 4 * 12)
    assert rows["attention", "decode"][2] == 15 * 8
    assert rows["head", "nvjet_large"][2] == 80


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("decode", "decode"),
        ("void at::native::(anonymous namespace)::softmax<int, 4>(int, float*)", "native::softmax"),
        (
            "std::enable_if<!(false), void>::type internal::gemvx::kernel<int, __nv_bfloat16, P<A, B>>(P<A>)",
            "gemvx::kernel",
        ),
        ("void cutlass::Kernel2<cutlass_80_tensorop_gemm_8>(P)", "cutlass::Kernel2<cutlass_80_tensorop_gemm_8>"),
        ("triton_" + "x" * 60, "triton_" + "x" * 46 + "..."),
    ],
)
def test_names_are_short_and_still_tell_kernels_apart(name: str, short: str) -> None:
    assert short_name(name) == short


def test_the_printed_table_has_shares_of_the_read_rate_and_what_is_no_kernel() -> None:
    text = io.StringIO()
    print_kernels("depth 2", kernel_table(profile_of(STEP), SHAPE), 160e6, Console(file=text, width=130))
    lines = text.getvalue().splitlines()
    assert lines[0].startswith("depth 2: medians of 3 of 4 steps")
    assert "15 tokens of KV" in lines[0]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert ["gate, up", "_matrix", "2", "8.0", "0.0", "15"] in cells  # 192 bytes in 8 us are 24 of 160 MB/s
    assert ["", "_write_kv", "2", "1.0", "", ""] in cells
    assert ["idle", "", "", "5.0", "", ""] in cells
    assert cells[-1][:4] == ["step, profiled", "", "", "50.0"]
