"""The attention function that transformers' models call.

The name `ATTENTION_NAME` is registered with transformers' AttentionInterface, but not with its mask interface. For a
name that the mask interface does not know, transformers builds no mask; a registered builder would first wait for the
device.

A layer gets the step's data from the handler that is installed around the model's forward, not from the model's keyword
arguments, because some families drop those. The handler is `PagedAttention` in a step, and a probe when the gate
examines a new model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol

import torch
from torch import nn
from transformers import AttentionInterface

from workers.gpu.attention.backend import StepAttention
from workers.gpu.execution.step_batch import StepBatch
from workers.gpu.memory.kv_cache import KVCache

ATTENTION_NAME: Final = "ringfeed_paged"
MASKED_NAME: Final = "ringfeed_masked"  # the same function with masks, which the gate checks (model/masks.py)


class AttentionHandler(Protocol):
    """Receives the attention calls of one forward over a packed batch of T tokens."""

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,  # [T, num_heads, head_dim_k]
        key: torch.Tensor,  # [T, num_kv_heads, head_dim_k]
        value: torch.Tensor,  # [T, num_kv_heads, head_dim_v]
        *,
        attention_mask: Any,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,  # [num_heads]
        others: dict[str, Any],
    ) -> torch.Tensor: ...  # [T, num_heads, head_dim_v]


class PagedAttention:
    """The handler of one step. It writes the step's K and V into the cache, then calls the backend's attention."""

    def __init__(self, cache: KVCache, batch: StepBatch, step_attention: StepAttention) -> None:
        self._cache = cache
        self._slot_mapping = batch.slot_mapping
        self._step_attention = step_attention

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
        layer_idx: int = module.layer_idx  # type: ignore[assignment]
        return self.run_layer(layer_idx, query, key, value, scaling, sliding_window, softcap, sinks)

    def run_layer(
        self,
        layer_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute one layer's attention, from tensors and scalars only, so that `custom_op` can wrap it."""
        cache = self._cache
        scales = cache.scales[layer_idx]
        cache.write(layer_idx, self._slot_mapping, key, value)
        return self._step_attention(
            query,
            cache.key[layer_idx],
            cache.value[layer_idx],
            scaling=scaling * scales.key,  # the scores are linear in K, up to the soft cap
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=sinks,
            value_scale=scales.value,
        )


_handler: AttentionHandler | None = None  # the current forward's handler; this process runs one forward at a time


@contextmanager
def handling_attention(handler: AttentionHandler) -> Iterator[None]:
    """Send the attention calls of the forwards inside this block to `handler`."""
    global _handler
    outer, _handler = _handler, handler
    try:
        yield
    finally:
        _handler = outer


@torch.library.custom_op("ringfeed::paged_attention", mutates_args=())
def _paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer_index: torch.Tensor,  # [] int64 on the CPU
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One layer's attention as one operator of a compiled graph. It writes only the cache, which is not in the
    graph."""
    assert isinstance(_handler, PagedAttention), "a compiled model was called outside of a step"
    output = _handler.run_layer(int(layer_index), query, key, value, scaling, sliding_window, softcap, sinks)
    return output.contiguous()  # contiguous, as the fake implementation below promises


@_paged_attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[1], value.shape[2])


def _attention_forward(
    module: nn.Module,
    query: torch.Tensor,  # [1, num_heads, T, head_dim_k]
    key: torch.Tensor,  # [1, num_kv_heads, T, head_dim_k]
    value: torch.Tensor,  # [1, num_kv_heads, T, head_dim_v]
    attention_mask: Any = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The function that transformers calls for each layer. Returns ([1, T, num_heads, head_dim_v], None)."""
    if torch.compiler.is_compiling():
        output = _paged_attention(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            module.layer_index,
            query.shape[-1] ** -0.5 if scaling is None else scaling,
            sliding_window,
            softcap,
            s_aux,
        )
        return output.unsqueeze(0), None
    assert _handler is not None, "a model on paged attention was called outside of a step"
    output = _handler.attend(
        module,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        attention_mask=attention_mask,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
        others=others,
    )
    return output.unsqueeze(0), None


def set_layer_indices(model: nn.Module) -> None:
    """Give each attention layer its number as a tensor. A tensor is an input of a compiled graph; an integer would be
    compiled into it."""
    for module in model.modules():
        if (index := layer_index(module)) is not None:
            module.layer_index = torch.tensor(index)


def layer_index(module: nn.Module) -> int | None:
    """Return transformers' number of this attention module's layer; None if the module has no KV cache."""
    index = getattr(module, "layer_idx", None)
    return index if isinstance(index, int) else None


for _name in (ATTENTION_NAME, MASKED_NAME):
    AttentionInterface.register(_name, _attention_forward)
