"""How much memory the largest step takes beside weights and KV cache: one is run before the cache is sized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import nn

from ipc.records import StepShape
from workers.gpu.attention.backend import AttentionBackend
from workers.gpu.batch import StepBatch
from workers.gpu.kv_cache import KVCache, LayerShape
from workers.gpu.model.runner import PagedModelRunner

_SAMPLER_BYTES: Final = 40  # per logit, for the most demanding sampler's temporaries


def measure_step_bytes(
    model: nn.Module,
    layers: Sequence[LayerShape],
    shape: StepShape,
    dtype: torch.dtype,
    device: torch.device,
    backend: AttentionBackend,
    vocab_size: int,
) -> int:
    """Run the model on padding alone, as large as a step can be. Returns bytes; 0 on the CPU, which has them to spare.

    Leaves no memory allocated, so that what the device then calls free is.
    """
    if device.type != "cuda":
        return 0
    num_seqs, num_tokens = shape.max_num_seqs, shape.max_num_batched_tokens

    def zeros(count: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(count, dtype=dtype, device=device)

    batch = StepBatch(
        input_ids=zeros(num_tokens, torch.int64),
        positions=zeros(num_tokens, torch.int64),
        slot_mapping=zeros(num_tokens, torch.int64),
        cu_seqlens=zeros(num_seqs + 1, torch.int32),
        seq_lens=zeros(num_seqs, torch.int32),
        seq_row=zeros(num_seqs, torch.int32),
        logits_index=zeros(num_seqs, torch.int64),
        block_table=zeros(shape.max_blocks_per_seq, torch.int32).unsqueeze(0),
        block_size=shape.block_size,
    )
    cache = KVCache(layers, 0, shape.block_size, dtype, device)  # the trash block alone
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    PagedModelRunner(model, cache, backend, vocab_size).logits(batch)
    model_bytes = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.synchronize(device)
    del cache, batch
    torch.cuda.empty_cache()
    return model_bytes + _SAMPLER_BYTES * num_seqs * vocab_size
