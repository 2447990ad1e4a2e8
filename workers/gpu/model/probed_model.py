"""The facts about a model that passed the gate. The probe finds them; the backend, the cache and the sampler use
them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workers.gpu.execution.row_state import RowState
from workers.gpu.memory.kv_cache import KVScales, LayerShape


@dataclass(frozen=True)
class ProbedModel:
    """The facts that the probe found about a model that passed the gate."""

    layers: list[LayerShape]
    cache_dtype: torch.dtype  # the model's own of K and V; the cache's in the result of `choose_cache_format`
    vocab_size: int  # width of the logits
    logits_dtype: torch.dtype
    has_softcap: bool  # in at least one layer's attention
    has_sinks: bool
    replays_decoder: bool = False  # its forward computes logits from an earlier output of its decoder, `DecoderOutput`
    row_states: tuple[RowState, ...] = ()  # that its layers keep beside the KV cache
    kv_scales: tuple[KVScales, ...] = ()  # of the cache's K and V in each layer; empty = all 1
