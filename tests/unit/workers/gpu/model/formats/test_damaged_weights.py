"""Damaged quantised weights are refused in one line, by the name of a tensor."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ipc.errors import ConfigError, ModelUnsupported
from tests.reference.quantised_checkpoints import FLOAT8, make_pair, mxfp4
from tests.unit.workers.gpu.model.formats.test_formats import CPU, PLAIN, weights
from workers.gpu.config import ModelConfig
from workers.gpu.model.loader import load_config, load_weights

NAME = "model.layers.1.mlp.up_proj"
EXPERTS = "model.layers.0.mlp.experts.down_proj"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


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


def test_quantised_weights_are_not_quantised_again(intact: Callable[[str], Path]) -> None:
    config = ModelConfig(path=str(intact(FP8)), device="cpu", quantization="fp8")
    with pytest.raises(ConfigError, match=r'model\.quantization \("fp8"\): .* are quantised already: leave it out'):
        load_weights(config, load_config(config.path), CPU, lambda *_: None)
