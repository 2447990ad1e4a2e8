"""The protocol of an attention backend, which computes attention over the paged cache, and the registry of backends.

To add a backend, write one file with a class of this protocol, and add one entry to `_BACKENDS` and its name to
`ModelConfig.attention`.
"""

from __future__ import annotations

import importlib
from typing import Final, Protocol

import torch

from ipc.errors import ConfigError
from workers.gpu.execution.step_batch import StepBatch
from workers.gpu.model.probed_model import ProbedModel

_BACKENDS: Final = {  # name -> "module:class", imported only when chosen: it may need further packages
    "torch": "workers.gpu.attention.torch_backend:TorchBackend",
    "triton": "workers.gpu.attention.triton_backend:TritonBackend",
    "varlen": "workers.gpu.attention.varlen_backend:VarlenBackend",
}
_ON_ANY_DEVICE: Final = "torch"  # the others need CUDA


class StepAttention(Protocol):
    """Computes the attention of one step. It is called once per layer."""

    def __call__(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
        value_scale: float = 1.0,
    ) -> torch.Tensor:
        """Each token attends to its own sequence's KV up to and including itself. The cache holds that KV already.

        Args:
            query: [T, num_heads, head_dim_k], of any strides.
            key_cache: [num_blocks + 1, block_size, num_kv_heads, head_dim_k], this layer's part of the cache; of the
                query's dtype, or of float8_e4m3fn.
            value_cache: [num_blocks + 1, block_size, num_kv_heads, head_dim_v].
            scaling: the factor of the scores, usually head_dim_k ** -0.5, times the scale of the cache's K.
            sliding_window: the number of positions that a token sees, itself included; None = all.
            softcap: scores become softcap * tanh(scores / softcap), before masking.
            sinks: [num_heads], an additional logit per head; it adds to the softmax's sum and has no value vector.
            value_scale: the scale of the cache's V, a factor of the result.

        Returns: [T, num_heads, head_dim_v] in the query's dtype, finite for padding tokens too.
        """


class AttentionBackend(Protocol):
    """Makes a `StepAttention` for each step. It lives as long as the model."""

    needs_host_lengths: bool  # True if a step reads lengths on the host; such a step cannot be captured in a graph

    def check(self, facts: ProbedModel) -> None:
        """Raise ConfigError for a model whose attention this backend cannot compute."""

    def begin_step(self, batch: StepBatch) -> StepAttention:
        """Compute once what all layers of a step share. The result is valid until the batch's buffers change."""


def make_backend(name: str, device: torch.device) -> AttentionBackend:
    """Return the backend called `name`; for "auto", Triton on CUDA and plain torch elsewhere.

    Raises ConfigError if the name is not registered, or if the backend does not run on this device or with this torch.
    """
    if name == "auto":
        name = "triton" if device.type == "cuda" else _ON_ANY_DEVICE
    if name not in _BACKENDS:
        raise ConfigError(f"model.attention ({name!r}) is unknown: use auto, {', '.join(_BACKENDS)}")
    if name != _ON_ANY_DEVICE and device.type != "cuda":
        raise ConfigError(
            f'model.attention ("{name}") needs CUDA, and the model runs on {device}: set it to "auto" or '
            f'"{_ON_ANY_DEVICE}", or model.device to "cuda"'
        )
    module_name, class_name = _BACKENDS[name].split(":")
    backend: AttentionBackend = getattr(importlib.import_module(module_name), class_name)()
    return backend
