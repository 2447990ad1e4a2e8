"""Weights in float8 e4m3, with one scale for all, for each output channel or for each block.

    weight        [N, K] float8 e4m3; experts may be merged: [E, N, K]
    weight_scale  [] or [1]: one; [N, 1] or [N]: of each channel; [ceil(N / rows), ceil(K / columns)]: of each block.
                  Also called weight_scale_inv; both are factors: weight * scale is the true weight

Sources: compressed-tensors (compressors/naive_quantized/base.py, quantization/lifecycle/forward.py: dequantize) for its
formats float-quantized and naive-quantized. AutoFP8 (auto_fp8/quantize.py) for one scale. DeepSeek-V3
(README_WEIGHTS.md) and transformers (integrations/finegrained_fp8.py: Fp8Dequantize) for blocks.

`input_scale` and `activation_scale` are fixed scales of the activations. We do not use them: our products take
activations in 16 bits, or choose a scale for each token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import torch

from workers.gpu.model.formats.stored_format import MalformedWeights, StoredWeight
from workers.gpu.products.fp8 import BLOCK

_E4M3: Final = "F8_E4M3"  # safetensors' name
_SCALES: Final = ("_scale", "_scale_inv")
_IGNORED: Final = ("input_scale", "activation_scale")


class Float8:
    """`blocks` has the sizes (rows, columns) of blocks that config.json declares."""

    def __init__(self, blocks: Sequence[tuple[int, int]] = ()) -> None:
        self._blocks = blocks

    def find(self, dtypes: Mapping[str, str]) -> Iterator[StoredWeight]:
        for name, dtype in dtypes.items():
            if dtype != _E4M3:
                continue
            scale = next((f"{name}{suffix}" for suffix in _SCALES if f"{name}{suffix}" in dtypes), None)
            if scale is None:
                names = " or ".join(f"{name}{suffix}" for suffix in _SCALES)
                raise MalformedWeights(f"the files lack a scale of the quantised weight {name} ({names})")
            module = name.rpartition(".")[0]
            ignored = (f"{module}.{each}" for each in _IGNORED)
            merged = (f"{name}_{each}" for each in _IGNORED)
            present = tuple(each for each in (*ignored, *merged) if each in dtypes)
            yield StoredWeight(name, {"weight": name, "scale": scale}, present)

    def dequantise(
        self, weight: StoredWeight, parts: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        stored, scale = parts["weight"], parts["scale"]
        if stored.ndim < 2:
            raise MalformedWeights(f"{weight.name} is {list(stored.shape)} in float8, and not a matrix")
        if not scale.is_floating_point():
            kind = str(scale.dtype).removeprefix("torch.")
            raise MalformedWeights(f"{weight.parts['scale']} is stored as {kind}, and not as a float")
        scale = scale.float()
        channels = self._of_channels(stored, scale)
        if channels is not None:
            factor, kept, is_held = channels[..., None], channels, True
        else:
            rows, columns = self._find_block(weight, stored, scale)
            factor, kept = self._of_blocks(stored, scale, rows, columns), scale
            is_held = rows == columns == BLOCK and stored.shape[-1] % BLOCK == 0
        values = (stored.float() * factor).to(dtype)
        is_kept = is_held and stored.ndim == 2 and bool((kept.isfinite() & (kept > 0)).all())
        return values, kept if is_kept else None

    def _of_channels(self, stored: torch.Tensor, scale: torch.Tensor) -> torch.Tensor | None:
        """Return the scale of each channel, [N] or [E, N]; None if there are several for one."""
        channels = stored.shape[:-1]
        if scale.numel() == 1:
            return scale.reshape([1] * len(channels)).expand(channels).contiguous()
        if scale.shape in (channels, (*channels, 1)):
            return scale.reshape(channels)
        if stored.ndim == 3 and scale.shape in ((len(stored),), (len(stored), 1), (len(stored), 1, 1)):
            return scale.reshape(-1, 1).expand(channels)
        return None

    def _find_block(self, weight: StoredWeight, stored: torch.Tensor, scale: torch.Tensor) -> tuple[int, int]:
        """Return the declared rows and columns of a block that fit. Blocks at the ends may be smaller."""
        *outer, num_rows, num_columns = stored.shape
        for rows, columns in self._blocks:
            if scale.shape == (*outer, -(-num_rows // rows), -(-num_columns // columns)):
                return rows, columns
        declared = " or ".join(f"{rows} x {columns}" for rows, columns in self._blocks)
        raise MalformedWeights(
            f"{weight.parts['scale']} is {list(scale.shape)}, which does not fit {weight.name} ({list(stored.shape)})"
            + (f" in blocks of {declared}" if declared else "")
        )

    def _of_blocks(self, stored: torch.Tensor, scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """Return the scale of each element, from those of blocks."""
        whole = scale.repeat_interleave(rows, -2)[..., : stored.shape[-2], :]
        return whole.repeat_interleave(columns, -1)[..., : stored.shape[-1]]
