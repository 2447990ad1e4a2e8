"""Attention over the paged cache by torch's own FlashAttention, `torch.nn.attention.varlen`: opt-in, on CUDA.

It serves for comparison, and for devices on which the Triton kernels are slow; `model.attention = "varlen"` selects it.
Its requirements on torch, device and model are checked at load, those on `cache.block_size` with the configuration. It
supports no soft caps, no sinks, no float32, and no value heads of another size than key heads.

That kernel gives a masked position the weight 0, and 0 x NaN is NaN. So if a token's V is NaN or infinite, earlier
tokens of the same chunk become NaN too where the kernel computes both in one tile. Other backends have no such limit.
The kernel never reads beyond a sequence's end.

The host reads no lengths, so that a graph can capture a step, `begin_step` included. The kernel's grid is made for the
largest lengths that the bucket may hold. Thread blocks beyond a sequence's tokens are launched too, and end at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from ipc.errors import ConfigError
from workers.gpu.execution.step_batch import StepBatch
from workers.gpu.model.probed_model import ProbedModel

_FIRST_TORCH: Final = (2, 13)  # the first with a FlashAttention that takes both a block table and a number of splits
_FIRST_CAPABILITY: Final = (8, 0)
_LARGEST_HEAD: Final = 256
_HEAD_MULTIPLE: Final = 8
_CURE: Final = 'set model.attention to "triton" or "auto"'


class VarlenBackend:
    """See `AttentionBackend`. Raises ConfigError if this torch or the current CUDA device does not support it."""

    needs_host_lengths = False

    def __init__(self) -> None:
        if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _FIRST_TORCH:
            raise _refusal(f"torch {torch.__version__} has no block tables in it, 2.13 and later have", "install that")
        if not torch.backends.cuda.is_flash_attention_available():
            raise _refusal(f"torch {torch.__version__} was built without FlashAttention", "install another build")
        capability = torch.cuda.get_device_capability()
        if capability < _FIRST_CAPABILITY:
            major, minor = capability
            raise _refusal(f"FlashAttention needs compute capability 8.0, and this GPU has {major}.{minor}")
        from torch.nn.attention.varlen import varlen_attn_out  # older versions of torch have no such module

        self._attend = varlen_attn_out

    def check(self, facts: ProbedModel) -> None:
        """See `AttentionBackend`."""
        if facts.cache_dtype not in (torch.bfloat16, torch.float16):
            raise _refusal(
                f"FlashAttention computes in bfloat16 or float16, and this model in {facts.cache_dtype}",
                "set model.dtype to one of these",
            )
        if facts.has_softcap:
            raise _refusal("torch's FlashAttention has no soft cap, and this model's attention has one")
        if facts.has_sinks:
            raise _refusal("torch's FlashAttention has no attention sinks, and this model has them")
        for index, layer in enumerate(facts.layers):
            dim_k, dim_v = layer.head_dim_k, layer.head_dim_v
            if dim_k != dim_v:
                raise _refusal(f"layer {index} has key heads of {dim_k} elements and value heads of {dim_v}")
            if dim_k % _HEAD_MULTIPLE or dim_k > _LARGEST_HEAD:
                raise _refusal(
                    f"layer {index} has heads of {dim_k} elements, and FlashAttention takes multiples of "
                    f"{_HEAD_MULTIPLE} up to {_LARGEST_HEAD}"
                )

    def begin_step(self, batch: StepBatch) -> VarlenStep:
        return VarlenStep(batch, self._attend)


class VarlenStep:
    """See `StepAttention`."""

    def __init__(self, batch: StepBatch, attend: Callable[..., object]) -> None:
        self._batch = batch
        self._attend = attend
        self._block_table = batch.block_table.index_select(0, batch.seq_row)  # [S, max_blocks_per_seq] int32
        self._cu_seqlens_k = torch.zeros_like(batch.cu_seqlens)  # of the KV; cu_seqlens are of the queries
        torch.cumsum(batch.seq_lens, 0, dtype=torch.int32, out=self._cu_seqlens_k[1:])
        self._max_k = self._block_table.shape[1] * batch.block_size

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
        assert softcap is None, "`check` refuses a model with a soft cap at load"
        assert sinks is None, "`check` refuses a model with sinks at load"
        assert value_scale == 1.0, "the configuration refuses this backend with a cache of 8 bits"
        if query.stride(-1) != 1:
            query = query.contiguous()
        result = query.new_zeros(query.shape)  # zeros, because the kernel does not write padding tokens
        self._attend(
            result,
            query,
            key_cache,
            value_cache,
            self._batch.cu_seqlens,
            self._cu_seqlens_k,
            self._batch.num_tokens,  # one sequence may have all of the step's tokens
            self._max_k,
            scale=scaling,
            # Positions before and after a token's own.
            window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
            enable_gqa=query.shape[1] != key_cache.shape[2],
            seqused_k=self._batch.seq_lens,
            block_table=self._block_table,
            # With more, most sequences' outputs are left unwritten: https://github.com/pytorch/pytorch/issues/194167
            num_splits=1,
        )
        return result


def _refusal(reason: str, cure: str | None = None) -> ConfigError:
    return ConfigError(f'model.attention ("varlen"): {reason}; {_CURE if cure is None else f"{cure}, or {_CURE}"}')
