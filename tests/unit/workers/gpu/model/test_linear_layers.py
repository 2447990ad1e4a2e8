"""A whole model in 8 bits: near its own dequantised weights, and refused where it makes no sense."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from ipc.errors import ConfigError, ModelUnsupported
from ipc.records import StepShape
from tests.reference.tiny_models import make_tiny_model
from workers.gpu.config import CacheConfig, ModelConfig
from workers.gpu.e4m3 import E4M3
from workers.gpu.model.compile import decoder_layers
from workers.gpu.model.gate import probe_logits
from workers.gpu.model.linear_layers import _tell_of_slow_prompts
from workers.gpu.model.loader import LoadedModel, load_model
from workers.gpu.products import multiply
from workers.gpu.products.product import Product

SHAPE = StepShape(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=32, block_size=4)
BLOCKS = torch.ones(3, 1)  # scales of up to 384 outputs and 128 inputs
ROUTER_OUTPUTS = 16  # so small are the layers of tiny models


def load(folder: Path, quantization: Literal["none", "fp8"] = "fp8") -> LoadedModel:
    config = ModelConfig(path=str(folder), dtype="float32", device="cpu", num_threads=1, quantization=quantization)
    with torch.inference_mode():
        return load_model(config, CacheConfig(), SHAPE, torch.device("cpu"), lambda *_: None)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "qwen3_moe", "gpt_oss", "deepseek_v2"])
def test_the_decoder_layers_of_a_model_become_fp8_and_the_head_does_not(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.gpu.products.product.ROUTER_OUTPUTS", ROUTER_OUTPUTS)
    model = load(make_tiny_model(family, tmp_path)).runner._model
    rounded = [module for module in model.modules() if isinstance(module, Product) and module.scale is not None]
    assert len(rounded) >= 2 * len(decoder_layers(model))
    assert all(weight.dtype == torch.float32 for weight in model.get_output_embeddings().parameters())  # type: ignore[operator]


def test_a_layer_whose_weight_the_models_own_code_reads_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.gpu.products.product.ROUTER_OUTPUTS", ROUTER_OUTPUTS)

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        gates = torch.nn.functional.linear(x.float(), self.gate_proj.weight.float())  # so reads LongCat's router
        result: torch.Tensor = self.down_proj(self.act_fn(gates) * self.up_proj(x))
        return result

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    folder = make_tiny_model("llama", tmp_path)
    exact, model = load(folder, "none").runner._model, load(folder).runner._model
    mlp: Any = decoder_layers(model)[0].mlp
    assert mlp.down_proj.weight.dtype == E4M3
    assert mlp.gate_proj.weight.dtype == torch.float32
    expected, logits = (probe_logits(each, SHAPE.max_model_len, torch.device("cpu")) for each in (exact, model))
    assert (logits - expected).norm() < 0.2 * expected.norm()


def test_a_model_whose_rounded_products_are_wrong_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.gpu.products.product.ROUTER_OUTPUTS", ROUTER_OUTPUTS)
    unscaled = multiply._unscaled
    monkeypatch.setattr(
        multiply, "_unscaled", lambda x, weight, scale, bias, out: unscaled(x, weight, 2 * scale, bias, out)
    )
    with pytest.raises(ModelUnsupported, match=r"from what its weights say: leave model\.quantization out"):
        load(make_tiny_model("llama", tmp_path))


def test_a_model_without_layers_to_round_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="finds no linear layers of more than 256 outputs"):
        load(make_tiny_model("llama", tmp_path))


@pytest.mark.parametrize(
    ("capability", "dtype", "outputs", "scale", "is_slow"),
    [
        ((9, 0), torch.bfloat16, 320, None, False),
        ((8, 0), torch.bfloat16, 320, None, True),
        ((9, 0), torch.float16, 320, None, True),
        ((9, 0), torch.bfloat16, 300, None, True),
        ((9, 0), torch.float16, 300, BLOCKS, False),
        ((9, 0), torch.float32, 300, BLOCKS, True),
        ((8, 0), torch.bfloat16, 300, BLOCKS, True),
    ],
)
def test_a_gpu_without_products_in_fp8_says_that_prompts_are_slow(
    capability: tuple[int, int],
    dtype: torch.dtype,
    outputs: int,
    scale: torch.Tensor | None,
    is_slow: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    layer = Product(torch.randn(outputs, 128))
    layer.to_fp8(scale)
    with caplog.at_level(logging.WARNING):
        _tell_of_slow_prompts([layer, Product(torch.randn(3, 5))], dtype, torch.device("cuda"))
        _tell_of_slow_prompts([layer], dtype, torch.device("cpu"))
    assert len(caplog.records) == is_slow
