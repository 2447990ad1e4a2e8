"""Models that would run wrongly on paged attention are refused at load, each with one clear error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ipc.errors import ConfigError, ModelUnsupported
from ipc.records import StepShape
from tests.reference.packed_steps import run_packed
from tests.reference.tiny_models import (
    MAX_POSITIONS,
    make_tiny_config,
    make_tiny_model,
    reference_generate,
    save_model,
)
from workers.gpu.config import CacheConfig, ModelConfig
from workers.gpu.model.gate import prepare_model, probe_model
from workers.gpu.model.loader import LoadedModel, load_model

SIZES: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def load(
    folder: Path, load_format: Any = "dummy", max_model_len: int = 64, cache: CacheConfig | None = None
) -> LoadedModel:
    return load_model(
        ModelConfig(path=str(folder), device="cpu", load_format=load_format, num_threads=1),
        cache or CacheConfig(),
        StepShape(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=max_model_len, block_size=4),
        torch.device("cpu"),
        lambda *_: None,
    )


def falcon() -> Any:
    return transformers.FalconConfig(**SIZES, ffn_hidden_size=64)


def gptj() -> Any:
    return transformers.GPTJConfig(vocab_size=99, n_embd=64, n_layer=2, n_head=4, n_positions=256, rotary_dim=8)


def bloom() -> Any:
    return transformers.BloomConfig(vocab_size=99, hidden_size=64, n_layer=2, n_head=4)


def mamba() -> Any:
    return transformers.MambaConfig(vocab_size=99, hidden_size=64, num_hidden_layers=2, state_size=4)


def doge() -> Any:
    return transformers.DogeConfig(**SIZES)


def gemma3n() -> Any:
    return transformers.Gemma3nTextConfig(
        **{**SIZES, "num_hidden_layers": 4}, head_dim=16, vocab_size_per_layer_input=99, num_kv_shared_layers=2,
        hidden_size_per_layer_input=8, laurel_rank=4, activation_sparsity_pattern=[0.0] * 4,
    )  # fmt: skip


def lfm2() -> Any:
    return transformers.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])


def qwen3_next() -> Any:
    return transformers.Qwen3NextConfig(
        **SIZES, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip


def bart() -> Any:
    return transformers.BartConfig(
        vocab_size=99, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
    )  # fmt: skip


def bert() -> Any:
    return transformers.BertConfig(**SIZES)


def bamba() -> Any:
    return transformers.BambaConfig(
        **SIZES, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=32, mamba_n_groups=1, mamba_d_state=8
    )


def rwkv() -> Any:
    return transformers.RwkvConfig(vocab_size=99, hidden_size=64, num_hidden_layers=2, attention_hidden_size=64)


def xlnet() -> Any:
    return transformers.XLNetConfig(vocab_size=99, d_model=64, n_layer=2, n_head=4, d_inner=64)


def diffllama() -> Any:
    return transformers.DiffLlamaConfig(**SIZES)


def hrm_text() -> Any:
    return transformers.HrmTextConfig(**SIZES, head_dim=16)


def nemotron_h() -> Any:
    return transformers.NemotronHConfig(**SIZES, layers_block_type=["mamba", "mlp"])


def blip_2() -> Any:
    return transformers.Blip2Config()


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (falcon, "attention interface"),
    (gptj, "attention interface"),
    (bloom, "attention interface"),
    (mamba, "layers of type linear_attention"),
    (doge, "own attention mask"),
    (gemma3n, "share the KV"),
    (lfm2, "layers of type conv"),
    (qwen3_next, "layers of type linear_attention"),
    (bart, "encoder-decoder"),
    (bert, "not causal"),
    (bamba, "layers of type"),
    (rwkv, "attention interface"),
    (xlnet, "attention interface"),
    (diffllama, "attention layer 0 attends more than once to the same keys"),
    (hrm_text, r"its layers attend more than once in a forward \(\d+ calls of 2 layers\)"),
    (nemotron_h, "it has layers of type linear_attention; known"),
    (blip_2, "transformers has no causal language model for model_type 'blip-2'"),
]


@pytest.mark.parametrize(("make_config", "reason"), REFUSED, ids=[make.__name__ for make, _ in REFUSED])
def test_a_model_that_would_run_wrongly_is_refused_with_its_reason(
    make_config: Callable[[], Any], reason: str, tmp_path: Path
) -> None:
    make_config().save_pretrained(tmp_path)
    with pytest.raises(ModelUnsupported, match=reason) as refusal:
        load(tmp_path)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 300


def llama4(chunk: int) -> Any:
    return transformers.Llama4TextConfig(
        **SIZES, head_dim=16, intermediate_size_mlp=64, num_local_experts=2, attention_chunk_size=chunk,
        initializer_range=0.2,
    )  # fmt: skip


def phimoe(window: int | None) -> Any:
    """Keeps its window to its mask."""
    return transformers.PhimoeConfig(**SIZES, sliding_window=window, num_local_experts=2, initializer_range=0.2)


def gemma4(**changes: Any) -> Any:
    text = transformers.Gemma4TextConfig(
        **SIZES, head_dim=16, sliding_window=9, hidden_size_per_layer_input=8, vocab_size_per_layer_input=99,
        initializer_range=0.2, bos_token_id=1, eos_token_id=None, **changes,
    )  # fmt: skip
    return transformers.Gemma4Config(text_config=text.to_dict())


def got_ocr2() -> Any:
    """Its vision tower, unused here, has its own attention; its text model uses transformers'."""
    eyes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 64, "mlp_dim": 64}
    text = {**SIZES, "model_type": "qwen2", "initializer_range": 0.2}
    return transformers.GotOcr2Config(text_config=text, vision_config={**eyes, "global_attn_indexes": [0]})


def emu3() -> Any:
    return transformers.Emu3Config(text_config={**SIZES, "initializer_range": 0.2, "vocabulary_map": {"<image>": 5}})


def modernbert_decoder() -> Any:
    return transformers.ModernBertDecoderConfig(**SIZES, local_attention=18, initializer_range=0.2)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (llama4(16), "beyond 16 tokens, this llama4_text model attends in chunks"),
        (phimoe(16), r"beyond 16 tokens, the mask of attention layer 0 .*\(no sliding window\)"),
    ],
    ids=["llama4", "phimoe"],
)
def test_a_length_at_which_a_mask_would_hide_what_attention_sees_is_refused_with_the_longest_that_runs(
    config: Any, reason: str, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"max_model_len \(17\) is more than 16: {reason}.*set it to 16 or less"):
        load(tmp_path, max_model_len=17)
    load(tmp_path, max_model_len=16)


@pytest.mark.parametrize(
    "config",
    [llama4(48), phimoe(48), phimoe(None), gemma4(), gemma4(use_bidirectional_attention="vision"), emu3(),
     modernbert_decoder(), got_ocr2()],
    ids=["llama4", "phimoe", "phimoe without window", "gemma4", "gemma4 with vision", "emu3", "modernbert-decoder",
         "got_ocr2"],
)  # fmt: skip
def test_a_model_whose_masks_are_no_more_than_attention_is_told_gives_the_tokens_of_generate(
    config: Any, tmp_path: Path
) -> None:
    save_model(config, tmp_path)
    config.save_pretrained(tmp_path)  # a model may save its text configuration alone
    prompts = [[3, 14, 15, 92, 65], [35] * 20]
    expected = reference_generate(tmp_path, prompts, 16)
    loaded = load(tmp_path, "safetensors", max_model_len=48)
    sequences = run_packed(loaded.runner, prompts, 16, num_blocks=loaded.num_blocks)
    assert [sequence.generated for sequence in sequences] == expected


def make_masks(**overlays: Any) -> Any:
    """Other masks that llama may request from transformers, instead of its plain causal mask."""
    return lambda *args, **kwargs: transformers.masking_utils.create_causal_mask(*args, **kwargs, **overlays)


def no_later_than(distance: int) -> Any:
    return transformers.masking_utils.sliding_window_overlay(distance)


@pytest.mark.parametrize(
    ("ask", "error"),
    [
        (transformers.masking_utils.create_bidirectional_mask, "layer 0 is neither causal nor"),
        (make_masks(or_mask_function=lambda b, h, q, k: k == 60), "layer 0 is neither causal nor"),
        (make_masks(and_mask_function=lambda b, h, q, k: k % 2 == q % 2), r"is more than 1\b|neither causal"),
        (make_masks(and_mask_function=no_later_than(40)), "beyond 40 tokens, the mask of attention layer 0"),
        (make_masks(and_mask_function=no_later_than(64)), None),
    ],
)  # fmt: skip
def test_the_gate_compares_the_masks_a_model_asks_for_with_what_attention_is_told(
    ask: Any, error: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    def create_mask(config: Any, inputs_embeds: Any, attention_mask: Any, past_key_values: Any, **_: Any) -> Any:
        return ask(config=config, inputs_embeds=inputs_embeds, attention_mask=attention_mask,
                   past_key_values=past_key_values)  # fmt: skip

    monkeypatch.setattr(modeling_llama, "create_causal_mask", create_mask)
    model = transformers.AutoModelForCausalLM.from_config(make_tiny_config("llama"), dtype=torch.float32).eval()
    prepare_model(model, 64)
    if error is None:
        assert probe_model(model, 64, torch.device("cpu")).vocab_size == model.config.vocab_size
        return
    with pytest.raises((ConfigError, ModelUnsupported), match=error):
        probe_model(model, 64, torch.device("cpu"))


def test_a_window_that_attention_is_told_and_the_mask_does_not_have_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mistral import modeling_mistral

    plain = transformers.masking_utils.create_causal_mask
    monkeypatch.setattr(modeling_mistral, "create_sliding_window_causal_mask", plain)
    model = transformers.AutoModelForCausalLM.from_config(make_tiny_config("mistral"), dtype=torch.float32).eval()
    prepare_model(model, 64)
    with pytest.raises(ConfigError, match=r"is more than 9: .*\(a sliding window of 9\)"):
        probe_model(model, 64, torch.device("cpu"))


class TokenShift(torch.nn.Module):
    """Mixes half of each token's predecessor into it: a short convolution that no configuration declares."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + 0.5 * torch.nn.functional.pad(hidden, (0, 0, 1, -1))


class OwnPositions(torch.nn.Module):
    """Adds a number for each place in the input, and ignores the positions."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + torch.arange(hidden.shape[1]).view(1, -1, 1) / 4


@pytest.mark.parametrize("intruder", [TokenShift, OwnPositions])
def test_the_probe_finds_tokens_that_meet_outside_of_attention(intruder: type[torch.nn.Module]) -> None:
    model = transformers.AutoModelForCausalLM.from_config(make_tiny_config("llama"), dtype=torch.float32).eval()
    prepare_model(model, 64)
    assert probe_model(model, 64, torch.device("cpu")).vocab_size == model.config.vocab_size
    model.model.layers[1].mlp = torch.nn.Sequential(model.model.layers[1].mlp, intruder())
    with pytest.raises(ModelUnsupported, match="outside of attention"):
        probe_model(model, 64, torch.device("cpu"))


def test_a_layer_without_attention_is_named() -> None:
    model = transformers.AutoModelForCausalLM.from_config(make_tiny_config("llama"), dtype=torch.float32).eval()
    prepare_model(model, 64)
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(ModelUnsupported, match="its layers 1 have no attention"):
        probe_model(model, 64, torch.device("cpu"))


def test_sequences_longer_than_the_models_positions_are_refused(tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path)
    with pytest.raises(ConfigError, match=rf"max_model_len \(257\) is more than the {MAX_POSITIONS} positions"):
        load(tmp_path, max_model_len=MAX_POSITIONS + 1)


def test_a_length_that_a_rope_factor_reaches_runs_as_in_transformers(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    make_tiny_model("llama", tmp_path, max_position_embeddings=16, rope_parameters=rope)
    with pytest.raises(ConfigError, match="is more than the 64 positions"):
        load(tmp_path, "safetensors", max_model_len=65)
    prompts = [list(range(3, 43)), [35] * 20]
    expected = reference_generate(tmp_path, prompts, 16)
    loaded = load(tmp_path, "safetensors", max_model_len=64)
    sequences = run_packed(loaded.runner, prompts, 16, num_blocks=loaded.num_blocks)
    assert [sequence.generated for sequence in sequences] == expected


def test_a_prepared_model_looks_for_no_padding_and_keeps_its_padding_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(*_: Any) -> None:
        raise AssertionError("it waits for the device")

    config = make_tiny_config("gpt2", pad_token_id=7)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    monkeypatch.setattr(transformers.PreTrainedModel, "warn_if_padding_and_no_attention_mask", look)
    with pytest.raises(AssertionError, match="waits for the device"):
        model(input_ids=torch.zeros(1, 3, dtype=torch.int64))
    prepare_model(model, 64)
    probe_model(model, 64, torch.device("cpu"))
    assert model.config.pad_token_id == 7


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 64, "factor": 4.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [4.0 + 0.5 * i for i in range(8)],
}  # fmt: skip


def test_longrope_runs_up_to_its_original_length_and_is_refused_beyond(tmp_path: Path) -> None:
    make_tiny_model("phi3", tmp_path, rope_parameters=LONGROPE, original_max_position_embeddings=64)
    with pytest.raises(ConfigError, match="more than 64: beyond it the longrope RoPE"):
        load(tmp_path, max_model_len=65)
    prompts = [[3, 14, 15, 92, 65], [35] * 20]
    expected = reference_generate(tmp_path, prompts, 16)
    loaded = load(tmp_path, "safetensors", max_model_len=64)
    sequences = run_packed(loaded.runner, prompts, 16, num_blocks=loaded.num_blocks)
    assert [sequence.generated for sequence in sequences] == expected


def test_dynamic_rope_is_frozen_to_its_form_for_short_sequences(tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    prompts = [[3, 14, 15, 92, 65], [35] * 20]
    expected = reference_generate(tmp_path, prompts, 16)
    loaded = load(tmp_path, "safetensors")
    sequences = run_packed(loaded.runner, prompts, 16, num_blocks=loaded.num_blocks)
    assert [sequence.generated for sequence in sequences] == expected


def test_dummy_weights_are_the_same_every_time_and_leave_the_random_state_alone(tmp_path: Path) -> None:
    make_tiny_config("llama").save_pretrained(tmp_path)  # config.json alone
    torch.manual_seed(5)
    untouched = torch.rand(1)
    generated = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        loaded = load(tmp_path)
        sequences = run_packed(loaded.runner, [[3, 14, 15]], 8, num_blocks=loaded.num_blocks)
        generated.append(sequences[0].generated)
        if seed == 5:
            assert torch.rand(1) == untouched
    assert generated[0] == generated[1]


def test_a_missing_folder_and_cut_or_missing_weights_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither a folder with a config\.json"):
        load(tmp_path / "nowhere")
    folder = make_tiny_model("llama", tmp_path / "llama")
    weights = folder / "model.safetensors"
    for content in (weights.read_bytes()[:1000], weights.read_bytes()[:-1], b"", b"<!DOCTYPE html>" * 100):
        weights.write_bytes(content)
        with pytest.raises(ConfigError, match=r"cannot be read: model\.safetensors is incomplete, .*: download it"):
            load(folder, "safetensors")
    weights.unlink()
    with pytest.raises(ConfigError, match=r"lacks weights \(model\.safetensors\)"):
        load(folder, "safetensors")


def test_weights_that_the_model_needs_and_the_file_lacks_are_refused(tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path)
    make_tiny_config("llama", num_hidden_layers=4).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"lacks 9 of the model's weights, model\.layers\.3"):
        load(tmp_path, "safetensors")


def test_weights_of_another_shape_are_named_with_both_shapes(tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path)
    make_tiny_config("llama", intermediate_size=24).save_pretrained(tmp_path)
    shapes = r"\[\d+, \d+\] in the files and (\[24, \d+\]|\[\d+, 24\]) in the model"
    with pytest.raises(ConfigError, match=rf"the weights of .*mlp\.\w+\.weight is {shapes}"):
        load(tmp_path, "safetensors")


@pytest.mark.parametrize(
    ("key", "value"),
    [("dtype", "float7"), ("hidden_size", "wide"), ("rope_parameters", "none"), ("model_type", "nonsense")],
)
def test_a_value_in_config_json_that_makes_no_sense_is_named(key: str, value: str, tmp_path: Path) -> None:
    make_tiny_config("llama").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(ModelUnsupported, match=rf"model\.path .*{value}"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({}, r"transformers \S+ does not know model_type 'nonsense' in config\.json: a later version may$"),
        ({"auto_map": {"AutoConfig": "configuration.Nonsense"}}, "needs Python code from its own repository"),
    ],
)
def test_a_model_type_that_transformers_does_not_know_is_one_short_line(
    more: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense", **SIZES, **more}))
    with pytest.raises(ModelUnsupported, match=reason) as refusal:
        load(tmp_path)
    assert "\n" not in str(refusal.value)


UNFIT: list[tuple[str, str, Any, str]] = [  # a family, a key, a value that does not fit, and what is said of it
    ("llama", "num_hidden_layers", 0, r"num_hidden_layers \(0\) gives it no layers"),
    ("gpt2", "n_layer", -1, r"num_hidden_layers \(-1\) gives it no layers"),
    ("llama", "hidden_act", "nonsense", r"config\.json: hidden_act \('nonsense'\) is not known to transformers"),
    (
        "llama",
        "rope_parameters",
        {"rope_type": "zigzag"},
        r"config\.json: rope_parameters\.rope_type \('zigzag'\) is not k",
    ),
    ("gemma2", "hidden_activation", "nonsense", r"config\.json: hidden_activation \('nonsense'\) is not known"),
    ("llama", "num_attention_heads", 0, r"config\.json: .*ZeroDivisionError"),
    ("llama", "num_key_value_heads", 0, r"config\.json: .*ZeroDivisionError"),
    ("llama", "head_dim", 0, r"config\.json: .*ZeroDivisionError"),
    ("llama", "head_dim", -1, r"config\.json: .*negative dimension -4"),
    ("llama", "vocab_size", -1, r"config\.json: .*negative dimension -1"),
    ("qwen3_moe", "head_dim", None, r"config\.json: .*NoneType"),
    ("qwen3_moe", "num_experts_per_tok", 7, r"config\.json: .*index k out of range"),
    ("llama", "dtype", 7, r"config\.json: .*'int' object"),
    ("llama", "dtype", [], r"config\.json: .*IndexError"),
]


@pytest.mark.parametrize("load_format", ["dummy", "safetensors"])
@pytest.mark.parametrize(("family", "key", "value", "reason"), UNFIT)
def test_values_of_config_json_that_make_no_model_are_one_clear_line(
    family: str, key: str, value: Any, reason: str, load_format: str, tmp_path: Path
) -> None:
    file = make_tiny_model(family, tmp_path) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(ModelUnsupported, match=reason) as refusal:
        load(tmp_path, load_format)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", ["float8_e4m3fn", "int8", "auto", "torch.bfloat16", "complex64", "nn"])
def test_a_dtype_that_no_model_computes_in_is_named(name: str, nested: bool, key: str, tmp_path: Path) -> None:
    plain = {**make_tiny_config("llama").to_dict(), "dtype": None, key: name}
    whole = {"model_type": "gemma3", "text_config": {**plain, "model_type": "gemma3_text"}} if nested else plain
    (tmp_path / "config.json").write_text(json.dumps(whole))
    with pytest.raises(ModelUnsupported, match=rf"dtype \('{name}'\) in config\.json is not one that models"):
        load(tmp_path)


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    weights = make_tiny_model("llama", tmp_path) / "model.safetensors"
    whole = load_file(weights)
    name = "model.layers.1.mlp.up_proj.weight"
    for value in (torch.nan, torch.inf):
        damaged = whole[name].clone()
        damaged[3, 4] = value
        save_file({**whole, name: damaged}, weights, {"format": "pt"})
        with pytest.raises(ModelUnsupported, match=rf"this llama model hold NaN or infinity \({name}\): either"):
            load(tmp_path, "safetensors")
    save_file({**whole, "lm_head.weight": whole["lm_head.weight"] * 1e38}, weights, {"format": "pt"})
    with pytest.raises(ModelUnsupported, match="this llama model are not finite in float32, though its weights"):
        load(tmp_path, "safetensors")


@pytest.mark.parametrize("zeros", ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_weights_without_content_are_put_down_to_their_files(zeros: str, tmp_path: Path) -> None:
    weights = make_tiny_model("llama", tmp_path) / "model.safetensors"
    whole = load_file(weights)
    save_file({**whole, zeros: torch.zeros_like(whole[zeros])}, weights, {"format": "pt"})
    with pytest.raises(ModelUnsupported, match="this llama model are the same for different tokens: the files of its"):
        load(tmp_path, "safetensors")


def test_a_model_that_rules_tokens_out_by_logits_of_minus_infinity_gives_the_tokens_of_generate(tmp_path: Path) -> None:
    weights = save_model(transformers.PhiConfig(**SIZES, eos_token_id=None), tmp_path) / "model.safetensors"
    whole = load_file(weights)
    whole["lm_head.bias"][-40:] = -torch.inf
    save_file(whole, weights, {"format": "pt"})
    prompts = [[3, 14, 15, 92, 65], [35] * 20]
    expected = reference_generate(tmp_path, prompts, 8)
    loaded = load(tmp_path, "safetensors")
    sequences = run_packed(loaded.runner, prompts, 8, num_blocks=loaded.num_blocks)
    assert [sequence.generated for sequence in sequences] == expected


def test_heads_that_do_not_divide_among_the_kv_heads_are_refused_with_both_numbers(tmp_path: Path) -> None:
    make_tiny_config("llama", num_key_value_heads=3).save_pretrained(tmp_path)
    with pytest.raises(ModelUnsupported, match="the 4 heads of attention layer 0 do not divide among its 3 KV heads"):
        load(tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_the_device_raises_is_not_put_down_to_the_configuration(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    make_tiny_config("llama").save_pretrained(tmp_path)
    monkeypatch.setattr("workers.gpu.model.loader.probe_model", fail)
    with pytest.raises(type(error)) as caught:
        load(tmp_path)
    assert caught.value is error


def test_loading_reports_each_stage_up_to_its_end(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # threads would have read it all before the first report
    make_tiny_model("llama", tmp_path)
    capfd.readouterr()
    seen: list[tuple[str, float]] = []
    counted: set[int] = set()

    def progress(stage: str, fraction: float, total_bytes: int = 0) -> None:
        seen.append((stage, fraction))
        counted.add(total_bytes)

    load_model(
        ModelConfig(path=str(tmp_path), device="cpu"),
        CacheConfig(),
        StepShape(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64, block_size=4),
        torch.device("cpu"),
        progress,
    )
    weights = [fraction for stage, fraction in seen if stage == "loading weights"]
    assert weights == sorted(weights)
    assert len(weights) > 10
    assert weights[-1] == 1.0
    assert seen[-1] == ("allocating the KV cache", 1.0)
    assert counted == {0, (tmp_path / "model.safetensors").stat().st_size}
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_a_number_that_is_no_key_is_not_taken_for_every_value_that_equals_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError(0)  # which False and 0.0 equal

    make_tiny_config("llama").save_pretrained(tmp_path)
    monkeypatch.setattr("workers.gpu.model.loader.probe_model", fail)
    with pytest.raises(ModelUnsupported, match=r"cannot build a model from its values \(KeyError: 0\)"):
        load(tmp_path)
