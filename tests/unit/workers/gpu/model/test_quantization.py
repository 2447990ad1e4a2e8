"""Quantised weights that would not be scaled back are refused by name. Weights that transformers can load still
load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ipc.errors import ConfigError, ModelUnsupported
from tests.reference.tiny_models import make_tiny_config, make_tiny_model, save_model
from tests.unit.workers.gpu.model.test_gate import SIZES, load

FLOAT8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def rewrite(folder: Path, change: Any) -> None:
    """Replace the tensors of a folder by what `change` makes of them."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def with_scales(*suffixes: str) -> Any:
    """Return a change that stores every projection's weight in eight bits, with scalars of these names beside it."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        result = {}
        for name, tensor in tensors.items():
            is_projection = name.endswith("_proj.weight")
            result[name] = (tensor * 100).to(FLOAT8) if is_projection else tensor
            if is_projection:
                module = name.removesuffix(".weight")
                result |= {f"{module}.{suffix}": torch.tensor(0.01) for suffix in suffixes}
        return result

    return change


def refusal(folder: Path) -> str:
    with pytest.raises((ModelUnsupported, ConfigError)) as caught:
        load(folder, "safetensors")
    assert_one_line(str(caught.value))
    return str(caught.value)


def assert_one_line(text: str) -> None:
    assert "\n" not in text
    assert "pip install" not in text
    assert len(text) < 600


@pytest.mark.parametrize(
    ("key", "declared", "said"),
    [
        ("quantization_config", {"quant_method": "modelopt", "quant_algo": "FP8"}, "'modelopt'"),
        ("quantization_config", {"quant_method": "exl3", "bits": 4}, "'exl3'"),
        ("quantization_config", {"quant_algo": "FP8"}, "no quant_method"),
        ("compression_config", {"quant_method": "compressed-tensors"}, "'compressed-tensors'"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_quantization_that_transformers_does_not_know_is_refused_before_any_weight_is_read(
    key: str, declared: Any, said: str, nested: bool, tmp_path: Path
) -> None:
    make_tiny_config("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    if nested:
        text = json.loads((tmp_path / "config.json").read_text())
        transformers.Gemma3Config().save_pretrained(tmp_path)
        edit(tmp_path, text_config={**text, "model_type": "gemma3_text", key: declared}, vision_config=None)
    else:
        edit(tmp_path, **{key: declared})
    text = refusal(tmp_path)
    assert said in text
    assert "use an unquantised checkpoint" in text


@pytest.mark.parametrize(
    "declared",
    [None, {}, {"load_in_8bit": False, "load_in_4bit": False},
     {"quant_method": "bitsandbytes", "load_in_8bit": False, "load_in_4bit": False}],
)  # fmt: skip
def test_a_declaration_that_quantises_nothing_is_none(declared: Any, tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path)
    edit(tmp_path, quantization_config=declared)
    load(tmp_path, "safetensors")


@pytest.mark.parametrize("declared", ["fp8", ["fp8"], 8, {"quant_method": ["fp8"]}, {"quant_method": {}}, {"bits": 4}])
def test_a_declaration_of_the_wrong_type_is_one_line(declared: Any, tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path)
    edit(tmp_path, quantization_config=declared)
    assert "quant" in refusal(tmp_path) or "config.json" in refusal(tmp_path)


METHODS = sorted(transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING.keys() - {"gguf"})  # it needs its own files


@pytest.mark.parametrize("method", METHODS)
def test_a_quantization_that_transformers_cannot_load_here_is_one_line(method: str, tmp_path: Path) -> None:
    """With any packages installed. The weights are not quantised, so a method without packages may load them."""
    name, _, bits = method.partition("_") if method.startswith("bitsandbytes") else (method, "", "")
    make_tiny_model("llama", tmp_path)
    edit(tmp_path, quantization_config={"quant_method": name, **({f"load_in_{bits}": True} if bits else {})})
    try:
        load(tmp_path, "safetensors")
    except (ConfigError, ModelUnsupported) as error:
        assert_one_line(str(error))


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.quantizers import quantizer_awq

    monkeypatch.setattr(quantizer_awq, "is_gptqmodel_available", lambda: False)
    make_tiny_model("llama", tmp_path)
    declared = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemv"}
    edit(tmp_path, quantization_config=declared)
    assert "'awq'), which transformers cannot load: it needs gptqmodel, missing here" in refusal(tmp_path)


def test_an_export_of_modelopt_without_a_word_in_config_json_is_refused(tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path)
    export = tmp_path / "hf_quant_config.json"
    export.write_text(json.dumps({"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}))
    assert "hf_quant_config.json says that the weights are quantised (NVFP4)" in refusal(tmp_path)
    export.write_text("{")
    assert "quantised (in a way that cannot be read)" in refusal(tmp_path)
    export.write_text(json.dumps({"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}))
    load(tmp_path, "safetensors")  # the weights are whole


@pytest.mark.parametrize(
    "suffixes", [("weight_scale", "input_scale"), ("weight_scale_inv",), ("scales", "qzeros"), ("SCB",), ("g_idx",)]
)
def test_scales_that_nothing_applies_are_refused_by_name(suffixes: tuple[str, ...], tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path)
    rewrite(tmp_path, with_scales(*suffixes))
    text = refusal(tmp_path)
    assert "tensors of quantised weights" in text
    assert any(f"_proj.{suffix} and " in text for suffix in suffixes)


def test_scales_of_a_kv_cache_do_not_hide_those_of_weights(tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path)
    rewrite(tmp_path, with_scales("weight_scale", "k_scale"))
    assert "down_proj.weight_scale and 20 more" in refusal(tmp_path)


def test_scales_of_single_experts_are_refused_too(tmp_path: Path) -> None:
    make_tiny_model("qwen3_moe", tmp_path)
    scale = {"model.layers.0.mlp.experts.0.gate_proj.weight_scale_inv": torch.ones(1, 1)}
    rewrite(tmp_path, lambda tensors: tensors | scale)
    assert "tensors of quantised weights" in refusal(tmp_path)


def test_packed_weights_are_called_quantised_and_not_missing(tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path)

    def pack(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        packed = {name: tensor for name, tensor in tensors.items() if not name.endswith("_proj.weight")}
        for name in tensors.keys() - packed.keys():
            packed[name.replace("weight", "qweight")] = torch.zeros(8, 8, dtype=torch.int32)
        return packed

    rewrite(tmp_path, pack)
    assert "tensors of quantised weights (model.layers.0.mlp.down_proj.qweight and 20 more)" in refusal(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_in_numbers_that_no_model_computes_in_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(tmp_path, lambda tensors: tensors | {name: (100 * tensors[name]).abs().to(dtype)})
    assert f"{name} is stored as {str(dtype).removeprefix('torch.')}), and config.json does not say how" in refusal(
        tmp_path
    )


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.up_proj.lora_A", "model.layers.3.mlp.up_proj.weight", "score.weight"]
)
def test_other_tensors_that_the_model_has_no_use_for_are_refused_by_name(name: str, tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {name: torch.zeros(3)})
    assert f"tensors that the model has no place for ({name}):" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("family", "name", "changes"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", {}),
        ("llama", "lm_head.weight", {"tie_word_embeddings": True}),
        ("gpt2", "transformer.h.0.attn.bias", {}),
        ("gpt2", "transformer.h.0.attn.masked_bias", {}),
        ("llama", "model.layers.0.self_attn.k_proj.k_scale", {}),
        ("llama", "model.layers.0.self_attn.v_scale", {}),
        ("llama", "model.layers.0.self_attn.v_proj.output_scale", {}),
        ("llama", "model.layers.0.attn.bias", {}),  # as the causal mask was called, where its class does not say so
        ("llama", "model.embed_positions.weights", {}),
        ("llama", "model.layers.3.embed_tokens.weight", {"num_nextn_predict_layers": 1}),
    ],
)
def test_tensors_that_no_model_of_the_kind_uses_do_no_harm(
    family: str, name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    make_tiny_model(family, tmp_path, **changes)

    def add(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return tensors | {name: tensors.get("model.embed_tokens.weight", torch.zeros(3)).clone()}

    rewrite(tmp_path, add)
    load(tmp_path, "safetensors")


def test_the_layers_for_multi_token_prediction_that_a_family_ignores_do_no_harm(tmp_path: Path) -> None:
    config = transformers.DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4}, kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8,
        v_head_dim=16, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
    )  # fmt: skip
    save_model(config, tmp_path)
    beyond = {"model.layers.61.eh_proj.weight": torch.ones(3), "model.layers.2.eh_proj.weight": torch.ones(3)}
    rewrite(tmp_path, lambda tensors: tensors | beyond)
    load(tmp_path, "safetensors")
    rewrite(tmp_path, lambda tensors: tensors | {"model.layers.3.eh_proj.weight": torch.ones(3)})
    assert "no place for (model.layers.3.eh_proj.weight)" in refusal(tmp_path)


def test_the_towers_of_a_multimodal_checkpoint_are_left_aside_by_a_text_model(tmp_path: Path) -> None:
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14, "projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32,
    }  # fmt: skip
    text = {**SIZES, "head_dim": 16, "intermediate_size_mlp": 64, "num_local_experts": 2}
    config = transformers.Llama4Config(text_config=text, vision_config=vision)
    transformers.Llama4ForConditionalGeneration(config).save_pretrained(tmp_path)
    load(tmp_path, "safetensors")
    scale = "language_model.model.layers.0.self_attn.q_proj.weight_scale"
    rewrite(tmp_path, lambda tensors: tensors | {scale: torch.ones(1)})
    assert "tensors of quantised weights" in refusal(tmp_path)
