"""A whole model in 8 bits: near its own dequantised weights, and refused where it makes no sense."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ipc.errors import ConfigError, ModelUnsupported
from ipc.records import StepShape
from tests.reference.tiny_models import make_tiny_model
from workers.gpu.config import CacheConfig, ModelConfig
from workers.gpu.model.compile import decoder_layers
from workers.gpu.model.loader import LoadedModel, load_model
from workers.gpu.products import multiply
from workers.gpu.products.product import Product

SHAPE = StepShape(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=32, block_size=4)
ROUTER_OUTPUTS = 16  # so small are the layers of tiny models


def load(folder: Path) -> LoadedModel:
    config = ModelConfig(path=str(folder), dtype="float32", device="cpu", num_threads=1, quantization="fp8")
    with torch.inference_mode():
        return load_model(config, CacheConfig(), SHAPE, torch.device("cpu"), lambda *_: None)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "qwen3_moe", "gpt_oss", "deepseek_v2"])
def test_the_decoder_layers_of_a_model_become_fp8_and_the_head_does_not(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.gpu.products.product._ROUTER_OUTPUTS", ROUTER_OUTPUTS)
    model = load(make_tiny_model(family, tmp_path)).runner._model
    rounded = [module for module in model.modules() if isinstance(module, Product) and module.scale is not None]
    assert len(rounded) >= 2 * len(decoder_layers(model))
    assert all(weight.dtype == torch.float32 for weight in model.get_output_embeddings().parameters())  # type: ignore[operator]


def test_a_model_whose_rounded_products_are_wrong_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.gpu.products.product._ROUTER_OUTPUTS", ROUTER_OUTPUTS)
    unscaled = multiply._unscaled
    monkeypatch.setattr(
        multiply, "_unscaled", lambda x, weight, scale, bias, out: unscaled(x, weight, 2 * scale, bias, out)
    )
    with pytest.raises(ModelUnsupported, match=r"from what its weights say: leave model\.quantization out"):
        load(make_tiny_model("llama", tmp_path))


def test_a_model_without_layers_to_round_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="finds no linear layers"):
        load(make_tiny_model("llama", tmp_path))
