"""Quantised checkpoints give the logits of their dequantised weights; damaged ones are refused by a tensor's name."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ipc.errors import ConfigError, ModelUnsupported
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
from workers.gpu.model.formats.recognise import stored_formats
from workers.gpu.model.loader import load_config, load_weights
from workers.gpu.products.product import Product

PROMPTS = [[3, 14, 15, 92, 65], [35] * 20]
CPU = torch.device("cpu")
NAME = "model.layers.1.mlp.up_proj"
EXPERTS = "model.layers.0.mlp.experts.down_proj"

FP8_CHANNEL = compressed_tensors("float-quantized", type="float", num_bits=8, strategy="channel")
FP8_TENSOR = compressed_tensors("naive-quantized", type="float", num_bits=8, strategy="tensor")
FP8_BLOCK = compressed_tensors("float-quantized", type="float", num_bits=8, strategy="block", block_structure=[40, 24])
AUTO_FP8 = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
DEEPSEEK = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [40, 24]}

GPTQ = {"quant_method": "gptq", "desc_act": True, "sym": False, "lm_head": False}


def integers(bits: int, **weights: Any) -> dict[str, Any]:
    defaults = {"type": "int", "num_bits": bits, "strategy": "group", "group_size": None, "symmetric": True}
    return compressed_tensors("pack-quantized", **{**defaults, **weights})


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
    loaded = load(folder, "safetensors")
    sequences = run_packed(loaded.runner, PROMPTS, 4, num_blocks=loaded.num_blocks)
    return torch.stack([each for sequence in sequences for each in sequence.logits])


def weights(folder: Path, dtype: Any = "float32") -> dict[str, torch.Tensor]:
    config = ModelConfig(path=str(folder), device="cpu", dtype=dtype)
    return load_weights(config, load_config(str(folder)), CPU, lambda *_: None).state_dict()


@pytest.mark.parametrize("name", PLAIN)
def test_a_quantised_checkpoint_gives_the_logits_of_its_dequantised_weights(name: str, tmp_path: Path) -> None:
    stored, plain = make_pair(tmp_path, *PLAIN[name], num_hidden_layers=1)
    assert torch.equal(logits(stored), logits(plain))


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
    torch.testing.assert_close(logits(stored), logits(plain), rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize(
    ("pack", "declared"),
    [
        (compressed_integers(4, 32, symmetric=False, whole_zeros=True), integers(4, group_size=32, symmetric=False)),
        (gptq(4, 32, zero_offset=1, bias=True), {**GPTQ, "bits": 4, "group_size": 32}),
        (gptq(4, 32, zero_offset=1), {**GPTQ, "bits": 8, "group_size": -1,
                                      "dynamic": {"-:.*lm_head.*": {}, "+:.*_proj": {"bits": 4, "group_size": 32}}}),
        (float8("channel"), {"quant_method": "fp8", "activation_scheme": "dynamic"}),
    ],
    ids=["whole zero points", "a bias of zeros", "settings of single layers", "a scale that its config does not name"],
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


def refusal(folder: Path) -> str:
    with pytest.raises((ModelUnsupported, ConfigError)) as caught:
        weights(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    return str(caught.value)


def damage(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that makes a checkpoint of two layers in a format of PLAIN, once."""
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            folders[name] = make_pair(tmp_path_factory.mktemp("intact"), *PLAIN[name], num_hidden_layers=2)[0]
        return folders[name]

    return make


def without(part: str) -> Any:
    return lambda tensors: tensors.pop(f"{NAME}.{part}")


def replaced(part: str, *shape: int, dtype: torch.dtype = torch.int32) -> Any:
    return lambda tensors: tensors.update({f"{NAME}.{part}": torch.ones(shape).to(dtype)})


FP8, INTEGERS, GPTQ_8 = "DeepSeek fp8", "W4A16, asymmetric", "GPTQ v2, 8 bits, act order"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (FP8, without("weight_scale_inv"),
         f"the files lack a scale of the quantised weight {NAME}.weight ({NAME}.weight_scale or"),
        (FP8, replaced("weight_scale_inv", 2, 2, dtype=torch.float32),
         f"{NAME}.weight_scale_inv is [2, 2], which does not fit {NAME}.weight ([96, 64]) in blocks of 40 x 24"),
        (FP8, replaced("weight_scale_inv", 3, 3), f"{NAME}.weight_scale_inv is stored as int32, and not as a float"),
        (FP8, replaced("weight", 96, 65, dtype=FLOAT8),
         f"{NAME}.weight is [96, 65] in the files and [96, 64] in the model"),
        (FP8, replaced("weight", 96, 64), f"tensors of quantised weights ({NAME}.weight_scale_inv)"),
        (INTEGERS, without("weight_scale"), f"the files lack {NAME}.weight_scale, a part of the quantised weight"),
        (INTEGERS, without("weight_zero_point"), f"the files lack {NAME}.weight_zero_point, a part of"),
        (INTEGERS, replaced("weight_zero_point", 11, 2), f"{NAME}.weight_zero_point is [11, 2], but"),
        (INTEGERS, replaced("weight_packed", 96, 6), f"{NAME}.weight_packed holds 6 words of 32 bits for 64 numbers"),
        (INTEGERS, replaced("weight_packed", 95, 8), f"{NAME}.weight_packed is [95, 8], but"),
        (INTEGERS, replaced("weight_packed", 96, 8, dtype=torch.uint8), f"{NAME}.weight_packed is stored as uint8"),
        (INTEGERS, replaced("weight_scale", 96, 4), f"{NAME}.weight_scale has 4 groups for 64 columns"),
        (INTEGERS, replaced("weight_scale", 95, 2), f"{NAME}.weight_scale is [95, 2], and not [96, groups]"),
        (INTEGERS, replaced("weight", 96, 64), f"the files hold {NAME}.weight twice"),
        ("W4A16, act order", replaced("weight_g_idx", 63), f"{NAME}.weight_g_idx is [63], but"),
        (GPTQ_8, without("scales"), f"the files lack {NAME}.scales, a part of the quantised weight {NAME}.qweight"),
        (GPTQ_8, without("qzeros"), f"the files lack {NAME}.qzeros"),
        (GPTQ_8, replaced("qzeros", 4, 12), f"{NAME}.qzeros holds 12 words of 32 bits for 96 numbers"),
        (GPTQ_8, replaced("qweight", 15, 96), f"{NAME}.qweight is [15, 96], but the other parts of {NAME}.weight need"),
        (GPTQ_8, replaced("scales", 3, 96), f"{NAME}.qzeros is [4, 24], but the other parts of {NAME}.weight need"),
        (GPTQ_8, lambda tensors: tensors[f"{NAME}.g_idx"].fill_(4), f"{NAME}.g_idx names the groups 4 to 4 of 4"),
        ("AWQ", replaced("qweight", 64, 24), f"{NAME}.qweight holds 24 words of 32 bits for 96 numbers"),
        ("AWQ", replaced("qzeros", 2, 13), f"{NAME}.qzeros is [2, 13], but"),
        ("AWQ", replaced("scales", 96), f"{NAME}.scales is [96], and not a matrix"),
    ],
)  # fmt: skip
def test_damaged_weights_are_refused_by_the_name_of_the_tensor(
    name: str, change: Any, said: str, intact: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(intact(name), tmp_path, dirs_exist_ok=True)
    damage(tmp_path, change)
    assert said in refusal(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop(f"{EXPERTS}_scales"), f"the files lack {EXPERTS}_scales"),
        (lambda tensors: tensors.update({f"{EXPERTS}_scales": torch.ones(4, 64, 2, dtype=torch.uint8)}),
         f"{EXPERTS}_scales is [4, 64, 2], but the other parts of {EXPERTS} need [4, 64, 3]"),
        (lambda tensors: tensors.update({f"{EXPERTS}_blocks": torch.ones(4, 64, 48, dtype=torch.uint8)}),
         f"{EXPERTS}_blocks is [4, 64, 48], and not [experts, N, K / 32, 16]"),
    ],
)  # fmt: skip
def test_damaged_experts_of_gpt_oss_are_refused_by_the_name_of_the_tensor(
    change: Any, said: str, tmp_path: Path
) -> None:
    sizes = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    stored, _ = make_pair(tmp_path, mxfp4, {"quant_method": "mxfp4"}, "gpt_oss", "_proj", **sizes)
    damage(stored, change)
    assert said in refusal(stored)


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


def test_quantised_weights_are_not_quantised_again(intact: Callable[[str], Path]) -> None:
    config = ModelConfig(path=str(intact(FP8)), device="cpu", quantization="fp8")
    with pytest.raises(ConfigError, match=r'model\.quantization \("fp8"\): .* are quantised already: leave it out'):
        load_weights(config, load_config(config.path), CPU, lambda *_: None)
