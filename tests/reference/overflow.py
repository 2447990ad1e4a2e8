"""A model with finite weights whose activations overflow for one token id, and checks of an engine that runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file, save_file

from ipc.errors import LogitsNotFinite
from pipeline import Client, SamplingParams
from tests.reference.tiny_models import make_tiny_model
from tests.unit.workers.text.tools import byte_level_tokenizer

OVERFLOWING: Final = 99
_PARAMS: Final = SamplingParams(max_tokens=8)
_BEGINNING: Final = [(7 * i) % 80 + 5 for i in range(48)]


def overflow_config(folder: Path, device: str, cache_dtype: str = "auto") -> dict[str, dict[str, Any]]:
    """Save the model, in float16, and configure an engine whose few blocks are used again and again."""
    make_tiny_model("llama", folder, seed=5)
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][:, 31] = 0
    weights["model.embed_tokens.weight"][OVERFLOWING, 31] = 8.0
    weights["model.layers.0.self_attn.o_proj.weight"][31] = 0  # this component comes from the embedding alone
    for name in ("gate_proj", "up_proj"):
        weights[f"model.layers.0.mlp.{name}.weight"][0, 31] = 600.0  # and their product does not fit float16
    halves = {name: tensor.half() for name, tensor in weights.items()}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in halves.values())
    save_file(halves, folder / "model.safetensors", {"format": "pt"})
    return {
        "model": {"path": str(folder), "dtype": "float16", "device": device, "num_threads": 1},
        "scheduler": {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 96},
        "cache": {"block_size": 16, "num_blocks": 12, "dtype": cache_dtype},
    }


def check_overflows(client: Client) -> None:
    """Check that an overflow ends its own request, whole, streamed or one of several samples, and changes no other."""
    clean = [[*_BEGINNING, 11, 12, 13], [3, 4, 5], _BEGINNING[:20], [50] * 30]
    expected = [client.generate(prompt, _PARAMS).token_ids for prompt in clean]
    bad = [
        [*_BEGINNING, OVERFLOWING, 5, 6],
        [OVERFLOWING],
        [OVERFLOWING, *_BEGINNING],
        _BEGINNING[:20] + [OVERFLOWING] * 20,
    ]
    client.clear_cache()
    for prompt in bad:
        with pytest.raises(LogitsNotFinite, match="not finite"):
            client.generate(prompt, _PARAMS)
    assert [client.generate(prompt, _PARAMS).token_ids for prompt in clean] == expected

    mixed = [prompt for pair in zip(bad, clean, strict=True) for prompt in pair] * 3
    outputs = client.generate_batch(mixed, _PARAMS)
    assert [output.token_ids for output in outputs[1::2]] == expected * 3
    assert {output.finish_reason for output in outputs[::2]} == {"error"}
    assert client.stats()["scheduler"]["num_not_finite"] == 4 + 12

    several = SamplingParams(max_tokens=8, n=3, temperature=1.0, top_p=0.9, seed=1)
    with pytest.raises(LogitsNotFinite):
        client.generate([5, OVERFLOWING, 6], several)
    with pytest.raises(LogitsNotFinite):
        list(client.generate([5, OVERFLOWING, 6], several, stream=True))
    assert len(client.generate([5, 6], several).completions) == 3
