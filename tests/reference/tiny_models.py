"""Tiny random models of many families, saved as folders, and the tokens that plain transformers generates from them.

Weights are drawn wide, so that logits differ by far more than rounding and greedy ties are rare.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch import nn

VOCAB_SIZE: Final = 199
MAX_POSITIONS: Final = 256
SLIDING_WINDOW: Final = 9  # no multiple of a block, and shorter than most test sequences

_COMMON: Final[dict[str, Any]] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_ALTERNATING: Final = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_EXPERTS: Final[dict[str, Any]] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_FAMILIES: Final[dict[str, tuple[str, dict[str, Any]]]] = {  # family -> (configuration class, what differs)
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": SLIDING_WINDOW}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 24}),
    "gemma2": ("Gemma2Config", {
        "head_dim": 16, "num_hidden_layers": 4, "layer_types": _ALTERNATING, "sliding_window": SLIDING_WINDOW,
        "attn_logit_softcapping": 5.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 20,
    }),
    "phi3": ("Phi3Config", {}),
    "olmo2": ("Olmo2Config", {}),
    "granite": ("GraniteConfig", {
        "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0,
    }),
    "qwen3_moe": ("Qwen3MoeConfig", {"head_dim": 16, **_EXPERTS}),
    "gpt_oss": ("GptOssConfig", {
        "head_dim": 16, "num_hidden_layers": 4, "layer_types": _ALTERNATING, "sliding_window": SLIDING_WINDOW,
        "num_local_experts": 4, "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    }),
    "gpt2": ("GPT2Config", {"pad_token_id": 0}),
    "deepseek_v2": ("DeepseekV2Config", {
        "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8, "v_head_dim": 12, "first_k_dense_replace": 3, "moe_intermediate_size": 48,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    }),
}  # fmt: skip
FAMILIES: Final = tuple(_FAMILIES)


def make_tiny_config(family: str, **changes: Any) -> Any:
    """The transformers configuration of a tiny model of `family`, with some fields changed."""
    class_name, differences = _FAMILIES[family]
    return getattr(transformers, class_name)(**{**_COMMON, **differences, **changes})


def make_tiny_model(family: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Save a random float32 model (config.json, model.safetensors, generation_config.json); returns its folder."""
    return save_model(make_tiny_config(family, **changes), folder, seed)


def save_model(config: Any, folder: Path, seed: int = 0) -> Path:
    """Make such a model from any configuration of a causal language model."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():  # families leave biases, norms and sinks at one value, where they would test nothing
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    return folder


def reference_model(folder: Path) -> Any:
    """The saved model as plain transformers runs it, with the attention written out in steps ("eager")."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    return model.eval()


def reference_generate(folder: Path, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    """The greedy continuation of each prompt by `model.generate`, one prompt at a time, without the prompt.

    Ends early at the model's end token, if it has one (by default, tiny models do not); that token is included.
    """
    model = reference_model(folder)
    return [generate_greedily(model, prompt, max_new_tokens) for prompt in prompts]


def generate_greedily(model: Any, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """One prompt's continuation by a `reference_model`."""
    ids = torch.tensor([list(prompt)])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


@torch.inference_mode()
def reference_logits(model: nn.Module, token_ids: Sequence[int]) -> torch.Tensor:
    """[len(token_ids), vocab_size] of one plain forward."""
    logits: torch.Tensor = model(input_ids=torch.tensor([list(token_ids)]), use_cache=False).logits[0]
    return logits
