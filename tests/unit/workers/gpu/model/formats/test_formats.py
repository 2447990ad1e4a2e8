"""Quantised checkpoints give the logits of their dequantised weights: exactly, except where products are in float8."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.reference.packed_steps import run_packed
from tests.reference.quantised_checkpoints import (
    FLOAT8,
    Pack,
    awq,
    compressed_integers,
    compressed_tensors,
    float8,
    gptq,
    make_pair,
    mxfp4,
)
from tests.unit.workers.gpu.model.test_gate import load
from workers.gpu.config import ModelConfig
from workers.gpu.model.formats.compressed_integers import CompressedIntegers
from workers.gpu.model.formats.float8 import Float8
from workers.gpu.model.formats.recognise import stored_formats
from workers.gpu.model.loader import LoadedModel, load_config, load_weights
from workers.gpu.products.int4 import from_int4
from workers.gpu.products.product import Product

PROMPTS = [[3, 14, 15, 92, 65], [35] * 20]
CPU = torch.device("cpu")

FP8_CHANNEL = compressed_tensors("float-quantized", type="float", num_bits=8, strategy="channel")
FP8_TENSOR = compressed_tensors("naive-quantized", type="float", num_bits=8, strategy="tensor")
FP8_BLOCK = compressed_tensors("float-quantized", type="float", num_bits=8, strategy="block", block_structure=[40, 24])
AUTO_FP8 = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
DEEPSEEK = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [40, 24]}

GPTQ = {"quant_method": "gptq", "desc_act": True, "sym": False, "lm_head": False}


def integers(bits: int, **weights: Any) -> dict[str, Any]:
    defaults = {"type": "int", "num_bits": bits, "strategy": "group", "group_size": None, "symmetric": True}
    return compressed_tensors("pack-quantized", **{**defaults, **weights})


IN_4_BITS = (
    "W4A16, asymmetric",
    "GPTQ",
    "AWQ",
)  # of those below, the ones whose products compute in the file's numbers
KEPT: dict[str, tuple[Pack, Mapping[str, Any]]] = {  # formats whose products compute in the file's float8
    "compressed-tensors fp8 by channel": (float8("channel", input_scale=0.1), FP8_CHANNEL),
    "compressed-tensors fp8 by tensor": (float8("tensor"), FP8_TENSOR),
    "AutoFP8": (float8("tensor", input_scale=0.1), AUTO_FP8),
}
PLAIN: dict[str, tuple[Pack, Mapping[str, Any]]] = {
    "compressed-tensors fp8 by block": (float8("block", (40, 24)), FP8_BLOCK),
    "DeepSeek fp8": (float8("block", (40, 24), "weight_scale_inv"), DEEPSEEK),
    "W4A16, asymmetric": (compressed_integers(4, 32, symmetric=False), integers(4, group_size=32, symmetric=False)),
    "W4A16, act order": (compressed_integers(4, 32, act_order=True), integers(4, group_size=32, actorder="group")),
    "W8A16 by channel": (compressed_integers(8, None), integers(8, strategy="channel")),
    "GPTQ": (gptq(4, 32, zero_offset=1), {**GPTQ, "bits": 4, "group_size": 32}),
    "GPTQ v2, 8 bits, act order": (
        gptq(8, 16, act_order=True),
        {**GPTQ, "bits": 8, "group_size": 16, "checkpoint_format": "gptq_v2"},
    ),
    "AWQ": (awq(32), {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}),
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def logits(folder: Path) -> torch.Tensor:
    return logits_of(load(folder, "safetensors"))


def logits_of(loaded: LoadedModel) -> torch.Tensor:
    sequences = run_packed(loaded.runner, PROMPTS, 4, num_blocks=loaded.num_blocks)
    return torch.stack([each for sequence in sequences for each in sequence.logits])


def weights(folder: Path, dtype: Any = "float32") -> dict[str, torch.Tensor]:
    config = ModelConfig(path=str(folder), device="cpu", dtype=dtype)
    return load_weights(config, load_config(str(folder)), CPU, lambda *_: None).state_dict()


@pytest.mark.parametrize("name", PLAIN)
def test_a_quantised_checkpoint_gives_the_logits_of_its_dequantised_weights(name: str, tmp_path: Path) -> None:
    stored, plain = make_pair(tmp_path, *PLAIN[name], num_hidden_layers=1)
    loaded = load(stored, "safetensors")
    assert torch.equal(logits_of(loaded), logits(plain))
    model: Any = loaded.runner._model
    products = [module for module in model.modules() if type(module) is Product]
    assert [product.weight.dtype for product in products] == ([torch.int32] * 4 if name in IN_4_BITS else [])


@pytest.mark.parametrize("name", IN_4_BITS)
def test_a_16_bit_model_has_the_numbers_of_a_4_bit_file_and_not_its_wide_weights(name: str, tmp_path: Path) -> None:
    stored, plain = make_pair(tmp_path, *PLAIN[name], num_hidden_layers=1, dtype="bfloat16")
    loaded = load(stored, "safetensors")
    expected = weights(plain, "bfloat16")
    model: Any = loaded.runner._model
    products = {each: module for each, module in model.named_modules() if type(module) is Product}
    assert len(products) == 4
    for each, product in products.items():
        parent, _, last = each.removesuffix(".joined").rpartition(".")
        parts = {"q_proj": ("q_proj", "k_proj", "v_proj"), "gate_proj": ("gate_proj", "up_proj")}.get(last, (last,))
        whole = torch.cat([expected[f"{parent}.{part}.weight"] for part in parts])
        assert product.scale is not None
        assert 4 * product.weight.nbytes == whole.nbytes
        assert torch.equal(from_int4(product.weight, product.scale, torch.bfloat16), whole)
    assert torch.equal(logits_of(loaded), logits(plain))


def test_the_experts_of_gpt_oss_are_dequantised(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    stored, plain = make_pair(tmp_path, mxfp4, {"quant_method": "mxfp4"}, "gpt_oss", "_proj", **sizes)
    assert torch.equal(logits(stored), logits(plain))


@pytest.mark.parametrize("name", ["W4A16, asymmetric", "compressed-tensors fp8 by channel"])
def test_single_experts_are_dequantised_and_merged(name: str, tmp_path: Path) -> None:
    stored, plain = make_pair(tmp_path, *(PLAIN | KEPT)[name], "qwen3_moe", num_hidden_layers=1)
    expected = weights(plain)
    assert all(torch.equal(tensor, expected[each]) for each, tensor in weights(stored).items())


def test_layers_of_several_formats_and_ordinary_ones_make_one_model(tmp_path: Path) -> None:
    by_channel, _ = KEPT["compressed-tensors fp8 by channel"]

    def pack(weight: torch.Tensor) -> Any:
        rows = len(weight)
        return {64: by_channel, 32: compressed_integers(4, 32)}.get(rows, lambda each: ({"weight": each}, each))(weight)

    groups = {
        "0": {"format": "float-quantized", "weights": FP8_CHANNEL["config_groups"]["group_0"]["weights"]},
        "1": {"format": "pack-quantized", "weights": {"type": "int", "num_bits": 4, "group_size": 32}},
    }
    declared = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}
    stored, plain = make_pair(tmp_path, pack, declared, num_hidden_layers=1)
    expected = weights(plain)
    assert all(torch.equal(tensor, expected[each]) for each, tensor in weights(stored).items())
    loaded = load(stored, "safetensors")
    torch.testing.assert_close(logits_of(loaded), logits(plain), rtol=1e-4, atol=1e-4)
    model: Any = loaded.runner._model
    dtypes = [module.weight.dtype for module in model.modules() if type(module) is Product]
    assert {FLOAT8, torch.int32} <= set(dtypes)  # what a file stores in one format is not fused with others


@pytest.mark.parametrize("name", KEPT)
def test_float8_by_channel_or_tensor_is_dequantised_exactly_and_computes_in_the_float8_of_the_file(
    name: str, tmp_path: Path
) -> None:
    stored, plain = make_pair(tmp_path, *KEPT[name], num_hidden_layers=1)
    expected = weights(plain)
    assert all(torch.equal(tensor, expected[each]) for each, tensor in weights(stored).items())
    torch.testing.assert_close(logits(stored), logits(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_hold_the_numbers_of_the_file_and_fused_ones_those_of_their_parts(dtype: str, tmp_path: Path) -> None:
    stored, _ = make_pair(tmp_path, *KEPT["compressed-tensors fp8 by channel"], dtype=dtype)
    file = load_file(stored / "model.safetensors")
    model: Any = load(stored, "safetensors").runner._model
    products = {name: each for name, each in model.named_modules() if type(each) is Product}
    assert len(products) == 3 * 4  # query, key and value; output; gate and up; down
    for name, product in products.items():
        module = name.removesuffix(".joined")
        parts = {"q_proj": ("q_proj", "k_proj", "v_proj"), "gate_proj": ("gate_proj", "up_proj")}
        parent, _, last = module.rpartition(".")
        names = [f"{parent}.{part}.weight" for part in parts.get(last, (last,))]
        bits = torch.cat([file[each] for each in names]).view(torch.uint8)
        assert torch.equal(product.weight.view(torch.uint8), bits)
        assert product.scale is not None
        assert torch.equal(product.scale, torch.cat([file[f"{each}_scale"] for each in names])[:, 0])


def test_products_hold_blocks_of_128_as_the_file_does_and_are_fused_where_blocks_stay_whole(tmp_path: Path) -> None:
    """Query has one block, key and value have half of one each: key can follow query, and value cannot follow key."""
    declared = {**DEEPSEEK, "weight_block_size": [128, 128]}
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 1}
    stored, plain = make_pair(tmp_path, float8("block", (128, 128), "weight_scale_inv"), declared, **sizes)
    file, expected = load_file(stored / "model.safetensors"), weights(plain)
    assert all(torch.equal(tensor, expected[each]) for each, tensor in weights(stored).items())
    loaded = load(stored, "safetensors")
    model: Any = loaded.runner._model
    products = {name: each for name, each in model.named_modules() if type(each) is Product}
    parts = {"q_proj": ("q_proj", "k_proj"), "gate_proj": ("gate_proj", "up_proj")}
    assert {name.split(".", 3)[3] for name in products} == {
        "self_attn.q_proj.joined", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj.joined", "mlp.down_proj",
    }  # fmt: skip
    for name, product in products.items():
        parent, _, last = name.removesuffix(".joined").rpartition(".")
        names = [f"{parent}.{part}.weight" for part in parts.get(last, (last,))]
        bits = torch.cat([file[each] for each in names]).view(torch.uint8)
        assert torch.equal(product.weight.view(torch.uint8), bits)
        assert product.scale is not None
        assert torch.equal(product.scale, torch.cat([file[f"{each}_scale_inv"] for each in names]))
    torch.testing.assert_close(logits_of(loaded), logits(plain), rtol=1e-4, atol=1e-4)


def without_order(weight: torch.Tensor) -> Any:
    parts, whole = gptq(4, 32, zero_offset=1)(weight)
    return {name: part for name, part in parts.items() if name != "g_idx"}, whole


@pytest.mark.parametrize(
    ("pack", "declared"),
    [
        (compressed_integers(4, 32, symmetric=False, whole_zeros=True), integers(4, group_size=32, symmetric=False)),
        (gptq(4, 32, zero_offset=1, bias=True), {**GPTQ, "bits": 4, "group_size": 32}),
        (gptq(4, 32, zero_offset=1), {**GPTQ, "bits": 8, "group_size": -1,
                                      "dynamic": {"-:.*lm_head.*": {}, "+:.*_proj": {"bits": 4, "group_size": 32}}}),
        (without_order, {**GPTQ, "bits": 4, "group_size": 32}),
        (float8("channel"), {"quant_method": "fp8", "activation_scheme": "dynamic"}),
        (float8("tensor", scale="weight_scale_inv", activation_scale=0.1),
         {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}),
    ],
    ids=["whole zero points", "a bias of zeros", "settings of single layers", "groups in order without g_idx",
         "a scale that its config does not name", "one inverse scale"],
)  # fmt: skip
def test_variants_that_tools_have_written_are_read(pack: Pack, declared: Any, tmp_path: Path) -> None:
    stored, plain = make_pair(tmp_path, pack, declared, num_hidden_layers=1)
    expected = weights(plain)
    assert all(torch.equal(tensor, expected[each]) for each, tensor in weights(stored).items())


def test_a_checkpoint_that_quantises_only_its_kv_cache_has_ordinary_weights(tmp_path: Path) -> None:
    declared = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}}
    assert stored_formats(declared) == ()
    stored, plain = make_pair(tmp_path, lambda weight: ({"weight": weight}, weight), declared, num_hidden_layers=1)
    expected = weights(plain)
    assert all(torch.equal(tensor, expected[each]) for each, tensor in weights(stored).items())


def test_words_that_the_last_numbers_do_not_fill_are_read() -> None:
    pack, weight = compressed_integers(4, None, symmetric=False), torch.randn(5, 13)
    parts, whole = pack(weight)
    stored_format = CompressedIntegers([4], [-1], has_zero_points=True)
    (found,) = stored_format.find({f"layer.{name}": "I32" for name in parts})
    values, _ = stored_format.dequantise(found, parts, torch.float32)
    assert torch.equal(values, whole)


@pytest.mark.parametrize(
    ("scale", "whole"),
    [
        ([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]],
         [[[1, 1, 2], [1, 1, 2], [3, 3, 4]], [[5, 5, 6], [5, 5, 6], [7, 7, 8]]]),
        ([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], [[[1] * 3, [2] * 3, [3] * 3], [[4] * 3, [5] * 3, [6] * 3]]),
        ([[[2.0]], [[3.0]]], [[[2] * 3] * 3, [[3] * 3] * 3]),
    ],
    ids=["blocks", "channels", "experts"],
)  # fmt: skip
def test_merged_experts_in_float8_have_scales_of_their_blocks_channels_or_experts(scale: Any, whole: Any) -> None:
    name, stored_format = "experts.gate_up_proj", Float8([(2, 2)])
    (found,) = stored_format.find({name: "F8_E4M3", f"{name}_scale_inv": "F32"})
    parts = {"weight": torch.ones(2, 3, 3).to(FLOAT8), "scale": torch.tensor(scale)}
    values, kept = stored_format.dequantise(found, parts, torch.float32)
    assert values.tolist() == whole
    assert kept is None


@pytest.mark.parametrize(
    "declared",
    [
        {**GPTQ, "bits": 3, "group_size": 32},
        {**GPTQ, "bits": 4, "group_size": 32, "checkpoint_format": "marlin"},
        {**GPTQ, "bits": 4, "group_size": 0},
        {**GPTQ, "bits": 4, "group_size": "many"},
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"},
        compressed_tensors("nvfp4-pack-quantized", type="float", num_bits=4, strategy="tensor_group", group_size=16),
        compressed_tensors("int-quantized", type="int", num_bits=8, strategy="channel"),
        compressed_tensors("pack-quantized", type="int", num_bits=3, strategy="group", group_size=32),
        compressed_tensors("float-quantized", type="float", num_bits=8, strategy="block", block_structure=[128]),
        {"quant_method": "compressed-tensors", "config_groups": {"W4A16": ["Linear"]}},
        {"quant_method": "fp8", "weight_block_size": [0, 128]},
    ],
)
def test_variants_that_we_do_not_read_are_left_to_transformers(declared: Any) -> None:
    assert stored_formats(declared) is None
