"""Decides how the KV cache stores K and V: in the model's own dtype, or in 8 bits with the checkpoint's scales."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open

from ipc.errors import ConfigError, ModelUnsupported
from workers.gpu.config import CacheConfig
from workers.gpu.e4m3 import E4M3
from workers.gpu.memory.kv_cache import KVScales
from workers.gpu.model.probed_model import ProbedModel

logger = logging.getLogger(__name__)

# The scales of K and V, as compressed-tensors (`k_scale` and, in older files, `k_proj.output_scale`), vLLM
# (`attn.k_scale`) and ModelOpt (`k_proj.k_scale`) name them.
CACHE_SCALE: Final = re.compile(r"\.(?P<kind>[kv])_(?:scale|proj\.output_scale)$")
_LAYER: Final = re.compile(r"(?:^|\.)(\d+)\.")
_CURE: Final = 'remove the scale from the files, or set cache.dtype to "auto"'
_FIRST_CAPABILITY: Final = (8, 9)  # the first whose instructions convert from and to e4m3
_SMALLEST_SCALE: Final = torch.finfo(torch.float32).tiny  # below it, the inverse may be infinite


def check_cache_dtype(config: CacheConfig, device: torch.device) -> None:
    """Raise ConfigError if the device cannot convert from and to the cache's dtype. Needs no model."""
    if config.dtype == "auto" or device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < _FIRST_CAPABILITY:
        major, minor = capability
        raise ConfigError(
            f'cache.dtype ("{config.dtype}") needs a GPU of compute capability 8.9, and this one has {major}.{minor}: '
            'set cache.dtype to "auto"'
        )


def choose_cache_format(facts: ProbedModel, config: CacheConfig, path: str, files: Iterable[Path]) -> ProbedModel:
    """Return the facts with the cache's dtype and scales in place of the model's own dtype.

    `files` are the weight files of `path`; without files, or for a layer without scales in them, the scales are 1.
    Raises ModelUnsupported for a scale that cannot be one.
    """
    if config.dtype == "auto":
        return facts
    scales = read_cache_scales(path, files, len(facts.layers))
    num_scaled = sum(scale != 1.0 for layer in scales for scale in (layer.key, layer.value))
    logger.info(
        "K and V are stored as %s; %d of %d scales differ from 1", config.dtype, num_scaled, 2 * len(scales)
    )  # fmt: skip
    return replace(facts, cache_dtype=E4M3, kv_scales=tuple(scales))


def read_cache_scales(path: str, files: Iterable[Path], num_layers: int) -> list[KVScales]:
    """Read the scales of each layer's K and V from a model's files; 1 for those that the files lack.

    Raises ModelUnsupported for a scale that is not one positive, finite number, or that the files give twice.
    """
    found: dict[tuple[int, str], tuple[str, float]] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in list(opened.keys()):
                at = _place(name)
                if at is None or at[0] >= num_layers:  # beyond: layers for multi-token prediction
                    continue
                scale = _checked(path, name, opened.get_tensor(name))
                other, value = found.setdefault(at, (name, scale))
                if value != scale:
                    raise ModelUnsupported(
                        f"model.path ({path!r}): its files hold two scales for the same part of the KV cache, {other} "
                        f"({value:g}) and {name} ({scale:g}): {_CURE}"
                    )

    def scale_of(index: int, kind: str) -> float:
        return found[index, kind][1] if (index, kind) in found else 1.0

    return [KVScales(scale_of(index, "k"), scale_of(index, "v")) for index in range(num_layers)]


def _place(name: str) -> tuple[int, str] | None:
    """Return the layer and the kind, "k" or "v", whose scale a tensor is; None for other tensors."""
    scale, layers = CACHE_SCALE.search(name), _LAYER.findall(name)
    return (int(layers[-1]), scale["kind"]) if scale and layers else None


def _checked(path: str, name: str, tensor: torch.Tensor) -> float:
    if tensor.numel() != 1:
        raise ModelUnsupported(
            f"model.path ({path!r}): the KV cache's scale {name} has {tensor.numel()} numbers, and "
            f'cache.dtype "fp8_e4m3" takes one for each layer: set cache.dtype to "auto"'
        )
    scale = float(tensor.float().item())
    if not (math.isfinite(scale) and scale >= _SMALLEST_SCALE):
        raise ModelUnsupported(
            f"model.path ({path!r}): the KV cache's scale {name} is {scale:g}, and a scale has to be finite and "
            f"at least {_SMALLEST_SCALE:.2g}: {_CURE}"
        )
    return scale
