"""Plain transformers models with rounded weights, activations and KV: the oracle of quantised models.

Everything here is plain torch in the model's own dtype. A value is rounded to its format and back, so the model's
forward stays transformers' own. Nothing of the engine is used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

Round = Callable[[torch.Tensor], torch.Tensor]

E4M3_MAX: Final = 448.0  # the largest finite value of float8_e4m3fn; a larger one would become NaN
_ROUNDED_KV: Final = "rounded_kv"


def fp8_per_row(values: torch.Tensor) -> torch.Tensor:
    """Round [..., n] to e4m3 and back, with one float32 scale for each row of n values: its largest over E4M3_MAX.

    Of a weight [outputs, inputs], a row is an output channel; of activations [..., inputs], it is a token.
    """
    wide = values.float()
    scale = wide.abs().amax(-1, keepdim=True) / E4M3_MAX
    scale = torch.where(scale == 0, 1.0, scale)
    return (through_e4m3(wide / scale) * scale).to(values.dtype)


def through_e4m3(values: torch.Tensor) -> torch.Tensor:
    """Round to e4m3 and back. Values beyond its range become its largest; NaN stays NaN."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(values.dtype)


def decoder_linears(model: Any, unlike: Sequence[str] = ()) -> Iterator[tuple[str, nn.Linear]]:
    """Return the linear layers of the decoder layers of a plain model, by name. The head is none of them.

    Args:
        unlike: the last parts of names of layers to leave out.
    """
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None) or decoder.h
    for name, module in layers.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in unlike:
            yield name, module


@torch.no_grad()
def round_weights(model: Any, rounding: Round = fp8_per_row, unlike: Sequence[str] = ()) -> int:
    """Replace the weight of each of `decoder_linears` by `rounding(weight)`. Returns their number."""
    layers = list(decoder_linears(model, unlike))
    for _, layer in layers:
        layer.weight.copy_(rounding(layer.weight))
    return len(layers)


def round_activations(model: Any, rounding: Round = fp8_per_row, unlike: Sequence[str] = ()) -> None:
    """Let each of `decoder_linears` multiply `rounding(x)` instead of x."""
    for _, layer in decoder_linears(model, unlike):
        layer.register_forward_pre_hook(lambda _, inputs: (rounding(inputs[0]), *inputs[1:]))


def round_kv(
    model: Any, rounding: Round = through_e4m3, scales: Mapping[int, tuple[float, float]] | None = None
) -> None:
    """Let attention read K and V as a cache of another format holds them: after rotary positions, divided by a scale.

    Args:
        scales: of K and of V by layer; a layer that is missing has 1.
    """
    model.config._attn_implementation = _ROUNDED_KV
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.kv_rounding = rounding
            module.kv_scales = (scales or {}).get(module.layer_idx, (1.0, 1.0))


def _attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **others: Any
) -> Any:
    """The family's own attention, written out in steps, with rounded K and V."""
    eager = sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
    scale_k, scale_v = module.kv_scales
    key, value = module.kv_rounding(key / scale_k) * scale_k, module.kv_rounding(value / scale_v) * scale_v
    return eager(module, query, key, value, attention_mask, **others)


AttentionInterface.register(_ROUNDED_KV, _attend)
AttentionMaskInterface.register(_ROUNDED_KV, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
