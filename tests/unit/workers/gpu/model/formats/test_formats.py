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
)
from tests.unit.workers.gpu.model.test_gate import load
from workers.gpu.config import ModelConfig
from workers.gpu.model.loader import load_config, load_weights
from workers.gpu.products.product import Product

PROMPTS = [[3, 14, 15, 92, 65], [35] * 20]
CPU = torch.device("cpu")
NAME = "model.layers.1.mlp.up_proj"

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
    stored, plain = make_pair(tmp_path, *PLAIN[name])
    assert torch.equal(logits(stored), logits(plain))


@pytest.mark.parametrize("name", KEPT)
def test_float8_by_channel_or_tensor_is_dequantised_exactly_and_computes_in_the_float8_of_the_file(
    name: str, tmp_path: Path
) -> None:
    stored, plain = make_pair(tmp_path, *KEPT[name])
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


def refusal(folder: Path) -> str:
    with pytest.raises((ModelUnsupported, ConfigError)) as caught:
        load(folder, "safetensors")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    return str(caught.value)


def damage(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("fp8"), *PLAIN["DeepSeek fp8"], num_hidden_layers=2)[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop(f"{NAME}.weight_scale_inv"),
         f"the files lack a scale of the quantised weight {NAME}.weight ({NAME}.weight_scale or"),
        (lambda tensors: tensors.update({f"{NAME}.weight_scale_inv": torch.ones(2, 2)}),
         f"{NAME}.weight_scale_inv is [2, 2], which does not fit {NAME}.weight ([96, 64]) in blocks of 40 x 24"),
        (lambda tensors: tensors.update({f"{NAME}.weight_scale_inv": torch.ones(3, 3, dtype=torch.uint8)}),
         f"{NAME}.weight_scale_inv is stored as uint8, and not as a float"),
        (lambda tensors: tensors.update({f"{NAME}.weight": torch.ones(96, 65).to(FLOAT8)}),
         f"{NAME}.weight is [96, 65] in the files and [96, 64] in the model"),
        (lambda tensors: tensors.update({f"{NAME}.weight": torch.ones(96, 64, dtype=torch.int8)}),
         f"tensors of quantised weights ({NAME}.weight_scale_inv)"),
    ],
)  # fmt: skip
def test_damaged_float8_is_refused_by_the_name_of_the_tensor(change: Any, said: str, fp8: Path, tmp_path: Path) -> None:
    shutil.copytree(fp8, tmp_path, dirs_exist_ok=True)
    damage(tmp_path, change)
    assert said in refusal(tmp_path)


def test_quantised_weights_are_not_quantised_again(fp8: Path) -> None:
    config = ModelConfig(path=str(fp8), device="cpu", quantization="fp8")
    with pytest.raises(ConfigError, match=r'model\.quantization \("fp8"\): .* are quantised already: leave it out'):
        load_weights(config, load_config(str(fp8)), CPU, lambda *_: None)
