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
    folder: Path,
    pack: Pack,
    declared: Mapping[str, Any],
    family: str = "llama",
    suffix: str = "_proj.weight",
    **changes: Any,
) -> tuple[Path, Path]:
    """Save a tiny model of `family` whose tensors of this suffix `pack` has quantised, and the same model with the
    dequantised weights in float32. Returns both folders."""
    stored = make_tiny_model(family, folder / "stored", **changes)
    plain = make_tiny_model(family, folder / "plain", **changes)
    parts: dict[str, torch.Tensor] = {}
    whole: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(stored / "model.safetensors").items():
        stem = name.removesuffix("weight")
        if name.endswith(suffix):
            packed, dequantised = pack(tensor)
            whole[name] = dequantised.contiguous()
            parts |= {stem + part: tensor.contiguous() for part, tensor in packed.items()}
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


def compressed_integers(
    bits: int, group_size: int | None, symmetric: bool = True, act_order: bool = False, whole_zeros: bool = False
) -> Pack:
    """compressed-tensors' "pack-quantized". Without a group size, each row has one scale; `whole_zeros`: as older
    versions stored zero points."""

    def pack(weight: torch.Tensor) -> Packed:
        groups = _groups(weight.shape[1], group_size or weight.shape[1], act_order)
        numbers, zeros, scales = _quantise(weight, groups, bits, symmetric)
        parts = {
            "weight_packed": _words(numbers, bits), "weight_scale": scales, "weight_shape": torch.tensor(weight.shape),
        }  # fmt: skip
        if not symmetric:
            packed_zeros = _words(zeros.T, bits).T
            parts["weight_zero_point"] = (zeros - 2 ** (bits - 1)).to(torch.int8) if whole_zeros else packed_zeros
        if act_order:
            parts["weight_g_idx"] = groups.int()
        return parts, _whole(numbers, zeros, scales, groups)

    return pack


def gptq(bits: int, group_size: int, zero_offset: int = 0, act_order: bool = False, bias: bool = False) -> Pack:
    """GPTQ's tensors. Format "gptq" stores zero points minus one; `bias`: with a bias of zeros."""

    def pack(weight: torch.Tensor) -> Packed:
        groups = _groups(weight.shape[1], group_size, act_order)
        numbers, zeros, scales = _quantise(weight, groups, bits, symmetric=False)
        zeros = zeros.clamp(min=zero_offset)
        parts = {
            "qweight": _words(numbers, bits).T, "qzeros": _words((zeros - zero_offset).T, bits), "scales": scales.T,
            "g_idx": groups.int(), **({"bias": torch.zeros(len(weight))} if bias else {}),
        }  # fmt: skip
        return parts, _whole(numbers, zeros, scales, groups)

    return pack


def awq(group_size: int) -> Pack:
    """AutoAWQ's tensors for its product "gemm"."""

    def interleave(numbers: torch.Tensor) -> torch.Tensor:
        order = [8 * word + each for word in range(numbers.shape[1] // 8) for each in (0, 2, 4, 6, 1, 3, 5, 7)]
        return _words(numbers[:, order], 4)

    def pack(weight: torch.Tensor) -> Packed:
        groups = _groups(weight.shape[1], group_size, act_order=False)
        numbers, zeros, scales = _quantise(weight, groups, 4, symmetric=False)
        parts = {"qweight": interleave(numbers.T), "qzeros": interleave(zeros.T), "scales": scales.T}
        return parts, _whole(numbers, zeros, scales, groups)

    return pack


def mxfp4(weight: torch.Tensor) -> Packed:
    """gpt-oss's experts [E, K, N], as blocks of 32 numbers along K."""
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
    blocks = weight.transpose(1, 2).unflatten(2, (-1, 32))
    exponents = (blocks.abs().amax(3) / 6).log2().ceil().clamp(-127, 127)
    scaled = blocks / exponents.exp2()[..., None]
    codes = torch.stack([(scaled - each).abs() for each in values]).argmin(0)
    whole = (values[codes] * exponents.exp2()[..., None]).flatten(2).transpose(1, 2)
    pairs = codes[..., 0::2] + 16 * codes[..., 1::2]
    return {"_blocks": pairs.to(torch.uint8), "_scales": (exponents + 127).to(torch.uint8)}, whole


def _groups(num_columns: int, group_size: int, act_order: bool) -> torch.Tensor:
    """The group of each column; with act order, groups of scattered columns."""
    in_order = torch.tensor([column // group_size for column in range(num_columns)])
    return in_order[torch.randperm(num_columns, generator=torch.Generator().manual_seed(1))] if act_order else in_order


def _quantise(
    weight: torch.Tensor, groups: torch.Tensor, bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return unsigned numbers [N, K], and zero points and scales [N, groups] in float16."""
    num_groups = int(groups.max()) + 1
    zeros = torch.full((len(weight), num_groups), 2 ** (bits - 1))
    scales = torch.zeros(len(weight), num_groups, dtype=torch.float16)
    numbers = torch.zeros(weight.shape, dtype=torch.int64)
    for group in range(num_groups):
        part = weight[:, groups == group]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        span = 2 * torch.maximum(-low, high) if symmetric else high - low
        scales[:, group] = span / (2**bits - 1)
        scale = scales[:, group].float()
        if not symmetric:
            zeros[:, group] = (-low / scale).round().clamp(0, 2**bits - 1)
        rounded = (part / scale[:, None]).round() + zeros[:, group, None]
        numbers[:, groups == group] = rounded.clamp(0, 2**bits - 1).long()
    return numbers, zeros, scales


def _whole(numbers: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    columns = [(numbers[:, k] - zeros[:, group]) * scales[:, group].float() for k, group in enumerate(groups.tolist())]
    return torch.stack(columns, 1)


def _words(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack rows of unsigned numbers into int32, the first number into the lowest bits."""
    count = 32 // bits
    words = torch.zeros(len(numbers), -(-numbers.shape[1] // count), dtype=torch.int64)
    for column in range(numbers.shape[1]):
        words[:, column // count] |= numbers[:, column].long() << (bits * (column % count))
    return words.to(torch.int32)  # keeps the lowest 32 bits


def compressed_tensors(format_name: str, **weights: Any) -> dict[str, Any]:
    """A quantization_config as llm-compressor writes it."""
    group = {"targets": ["Linear"], "input_activations": None, "output_activations": None, "weights": weights}
    return {
        "quant_method": "compressed-tensors", "format": format_name, "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*router"], "config_groups": {"group_0": group}, "kv_cache_scheme": None,
    }  # fmt: skip
