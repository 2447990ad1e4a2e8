"""What computes attention over the paged cache: the protocol, and the registry.

To add a backend: one file with a class of this protocol, one entry in `_BACKENDS`, and its name in
`ModelConfig.attention`.
"""

from __future__ import annotations

import importlib
from typing import Final, Protocol

import torch

from ipc.errors import ConfigError
from workers.gpu.execution.step_batch import StepBatch
from workers.gpu.model.probed_model import ProbedModel

_BACKENDS: Final = {  # name -> "module:class", imported when chosen: a backend may need packages that others do not
    "torch": "workers.gpu.attention.torch_backend:TorchBackend",
    "triton": "workers.gpu.attention.triton_backend:TritonBackend",
    "varlen": "workers.gpu.attention.varlen_backend:VarlenBackend",
}
_ON_ANY_DEVICE: Final = "torch"  # the others need CUDA


class StepAttention(Protocol):
    """Attention of one step, called once per layer."""

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
    ) -> torch.Tensor:
        """Each token attends to its own sequence's KV up to and including itself. The cache holds that KV already.

        Args:
            query: [T, num_heads, head_dim_k], of any strides.
            key_cache: [num_blocks + 1, block_size, num_kv_heads, head_dim_k], this layer's; value_cache alike.
            scaling: of the scores.
            sliding_window: how many positions a token sees, itself included; None = all.
            softcap: scores become softcap * tanh(scores / softcap), before masking.
            sinks: [num_heads], one more logit per head in the softmax's sum, that carries no value.

        Returns: [T, num_heads, head_dim_v] in the query's dtype, finite for padding tokens too.
        """


class AttentionBackend(Protocol):
    """Makes the attention of each step."""

    needs_host_lengths: bool  # reads lengths of the batch on the host: no step of it may be captured in a graph

    def check(self, facts: ProbedModel) -> None:
        """Raise ConfigError for a model whose attention this backend cannot compute."""

    def begin_step(self, batch: StepBatch) -> StepAttention:
        """Compute, once, what all layers of a step share. The result is good until the batch's buffers change."""


def make_backend(name: str, device: torch.device) -> AttentionBackend:
    """The backend of a name, or, for "auto", the best that is sure to run on `device`.

    Raises ConfigError for a name that is not registered, and for a backend that this device or torch does not have.
    """
    if name == "auto":
        name = "triton" if device.type == "cuda" else _ON_ANY_DEVICE
    if name not in _BACKENDS:
        raise ConfigError(f"there is no attention backend {name!r}; there are: {', '.join(_BACKENDS)}")
    if name != _ON_ANY_DEVICE and device.type != "cuda":
        raise ConfigError(
            f'model.attention ("{name}") needs CUDA, and the model runs on {device}: set it to "auto" or '
            f'"{_ON_ANY_DEVICE}", or model.device to "cuda"'
        )
    module_name, class_name = _BACKENDS[name].split(":")
    backend: AttentionBackend = getattr(importlib.import_module(module_name), class_name)()
    return backend
