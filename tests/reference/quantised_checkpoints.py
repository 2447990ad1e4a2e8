"""Saves small models in the formats of quantised checkpoints, and beside each the same model with whole weights.

Packs numbers one by one, as the formats' own documents describe them; the engine's code that unpacks them is not used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

from tests.reference.tiny_models import make_tiny_model

FLOAT8: Final = torch.float8_e4m3fn

Packed = tuple[dict[str, torch.Tensor], torch.Tensor]  # parts by their suffix, and the weight that they stand for
Pack = Callable[[torch.Tensor], Packed]


def make_pair(
    folder: Path, pack: Pack, declared: Mapping[str, Any], family: str = "llama", **changes: Any
) -> tuple[Path, Path]:
    """Save a tiny model of `family` whose projections `pack` has quantised, and the same model with the dequantised
    weights in float32. Returns both folders."""
    stored = make_tiny_model(family, folder / "stored", **changes)
    plain = make_tiny_model(family, folder / "plain", **changes)
    parts: dict[str, torch.Tensor] = {}
    whole: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(stored / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            packed, dequantised = pack(tensor)
            whole[name] = dequantised.contiguous()
            parts |= {name.removesuffix("weight") + suffix: part.contiguous() for suffix, part in packed.items()}
        else:
            parts[name] = whole[name] = tensor
    save_file(parts, stored / "model.safetensors", {"format": "pt"})
    save_file(whole, plain / "model.safetensors", {"format": "pt"})
    declare(stored, declared)
    return stored, plain


def declare(folder: Path, declared: Mapping[str, Any] | None) -> None:
    """Write a `quantization_config` into the folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": declared}))


def float8(strategy: str, block: tuple[int, int] = (1, 1), scale: str = "weight_scale", **others: float) -> Pack:
    """float8 e4m3 with a scale for each "tensor", "channel" or "block"; `others` are scalars beside it."""

    def pack(weight: torch.Tensor) -> Packed:
        num_rows, num_columns = weight.shape
        rows, columns = {"tensor": (num_rows, num_columns), "channel": (1, num_columns), "block": block}[strategy]
        scales = torch.zeros(-(-num_rows // rows), -(-num_columns // columns))
        values = torch.zeros(weight.shape, dtype=FLOAT8)
        whole = torch.zeros(weight.shape)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                part = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
                scales[i, j] = weight[part].abs().max() / 448
                values[part] = (weight[part] / scales[i, j]).to(FLOAT8)
                whole[part] = values[part].float() * scales[i, j]
        stored = scales[0, 0] if strategy == "tensor" else scales
        return {"weight": values, scale: stored, **{name: torch.tensor(each) for name, each in others.items()}}, whole

    return pack


def compressed_tensors(format_name: str, **weights: Any) -> dict[str, Any]:
    """A quantization_config as llm-compressor writes it."""
    group = {"targets": ["Linear"], "input_activations": None, "output_activations": None, "weights": weights}
    return {
        "quant_method": "compressed-tensors", "format": format_name, "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*router"], "config_groups": {"group_0": group}, "kv_cache_scheme": None,
    }  # fmt: skip
