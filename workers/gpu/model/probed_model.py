"""What is known of a model that may run: found by the gate's probe, read by whoever makes room for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workers.gpu.execution.row_state import RowState
from workers.gpu.memory.kv_cache import LayerShape


@dataclass(frozen=True)
class ProbedModel:
    """What the probe found out about a model that may run."""

    layers: list[LayerShape]
    cache_dtype: torch.dtype
    vocab_size: int  # of the logits
    logits_dtype: torch.dtype
    has_softcap: bool  # in some layer's attention
    has_sinks: bool
    row_states: tuple[RowState, ...] = ()  # that its layers keep beside the KV cache
