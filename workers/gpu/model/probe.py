"""Replaces attention while the gate probes a model. Records the attention calls, and compares them with their masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from transformers.masking_utils import causal_mask_function

from ipc.errors import ConfigError, ModelUnsupported
from workers.gpu.memory.kv_cache import LayerShape
from workers.gpu.model.masks import MaskFunction, agreeing_length, function_of

_HARMLESS_TENSORS: Final = (  # tensors that some families pass to attention, which does not use them
    "position_ids", "cache_position", "logits_to_keep",
)  # fmt: skip


def unsupported(config: Any, reason: str) -> ModelUnsupported:
    return ModelUnsupported(f"a {config.model_type} model cannot run on paged attention: {reason}")


@dataclass(frozen=True)
class Call:
    layer_idx: int | None
    shape: LayerShape
    dtype: torch.dtype
    sliding_window: int | None
    has_softcap: bool
    has_sinks: bool
    key: torch.Tensor  # kept alive, so that a later key at the same address is the same key


class Probe:
    """Records the attention calls of a forward. Its attention is a function of each token's own q, k and v."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self.calls: list[Call] = []

    def _check_mask(self, where: str, mask: Any, sliding_window: int | None, device: torch.device) -> None:
        if mask is not None:
            raise unsupported(self._config, f"{where} builds its own attention mask")

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        attention_mask: Any,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
        others: dict[str, Any],
    ) -> torch.Tensor:
        layer_idx = getattr(module, "layer_idx", None)
        where = f"attention layer {layer_idx}"
        self._check_mask(where, attention_mask, sliding_window, query.device)
        if others.get("is_causal", getattr(module, "is_causal", True)) is False:
            raise unsupported(self._config, f"{where} is not causal")
        extra = sorted(
            name for name, value in others.items() if isinstance(value, torch.Tensor) and name not in _HARMLESS_TENSORS
        )
        if extra:
            raise unsupported(self._config, f"{where} passes further tensors to attention: {', '.join(extra)}")
        if not query.dtype == key.dtype == value.dtype:
            raise unsupported(
                self._config, f"{where} mixes dtypes: query {query.dtype}, key {key.dtype}, value {value.dtype}"
            )
        for call in self.calls:
            if call.key.data_ptr() == key.data_ptr():
                same = call.layer_idx == layer_idx
                detail = "attends more than once to the same keys" if same else "shares the KV of an earlier layer"
                raise unsupported(self._config, f"{where} {detail}")
        shape = LayerShape(key.shape[1], key.shape[2], value.shape[2])
        self.calls.append(
            Call(layer_idx, shape, key.dtype, sliding_window, softcap is not None, sinks is not None, key)
        )
        num_heads = query.shape[1]
        if num_heads % shape.num_kv_heads:
            raise unsupported(
                self._config, f"the {num_heads} heads of {where} do not divide among its {shape.num_kv_heads} KV heads"
            )
        repeats = num_heads // shape.num_kv_heads
        gate = torch.tanh(query.mean(-1) + key.mean(-1).repeat_interleave(repeats, dim=1))  # [T, num_heads]
        return value.repeat_interleave(repeats, dim=1) * (1 + gate.unsqueeze(-1))


class MaskProbe(Probe):
    """Compares the mask of each attention call with the call's other arguments."""

    def __init__(self, config: Any, max_model_len: int) -> None:
        super().__init__(config)
        self._max_model_len = max_model_len
        self._lengths: dict[tuple[MaskFunction, int | None], int] = {}  # layers share a few masks

    def _check_mask(self, where: str, mask: Any, sliding_window: int | None, device: torch.device) -> None:
        function = causal_mask_function if mask is None else function_of(mask)
        if function is None:
            raise unsupported(self._config, f"{where} builds its own attention mask")
        length = self._lengths.get((function, sliding_window))
        if length is None:
            length = agreeing_length(function, sliding_window, self._max_model_len, device)
            self._lengths[function, sliding_window] = length
        if length == self._max_model_len:
            return
        if length <= 1:
            raise unsupported(self._config, f"the mask of {where} is neither causal nor a sliding window")
        passed = "no sliding window" if sliding_window is None else f"a sliding window of {sliding_window}"
        raise ConfigError(
            f"scheduler.max_model_len ({self._max_model_len}) is more than {length}: beyond {length} tokens, the mask "
            f"of {where} of this {self._config.model_type} model differs from what the layer passes to attention "
            f"({passed}), and paged attention uses no masks; set it to {length} or less"
        )
