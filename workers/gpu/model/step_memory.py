"""The largest step there can be: run on padding alone, before the cache is sized, to compile for it, and to see what
memory it takes beside weights and KV cache and whether it waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from ipc.record_layout import field_names
from ipc.records import StepShape
from workers.gpu.attention.backend import AttentionBackend
from workers.gpu.execution.step_batch import BatchBuffers, StepBatch
from workers.gpu.memory.account import sampler_bytes
from workers.gpu.memory.kv_cache import KVCache
from workers.gpu.memory.out_of_memory import is_out_of_memory
from workers.gpu.model.paged_runner import PagedModelRunner
from workers.gpu.model.probed_model import ProbedModel


def largest_step(
    model: nn.Module, facts: ProbedModel, shape: StepShape, device: torch.device, backend: AttentionBackend
) -> Callable[[], torch.Tensor]:
    """Something that runs the model on a step as large as `shape` allows, with a cache of one block: its logits."""
    num_seqs, num_tokens = shape.max_num_seqs, shape.max_num_batched_tokens

    batches = BatchBuffers(
        shape,
        lambda num_bytes: torch.zeros(num_bytes, dtype=torch.uint8, device=device),
        torch.zeros((1, shape.max_blocks_per_seq), dtype=torch.int32, device=device),
        {state.name: torch.zeros((1, *state.shape), dtype=state.dtype, device=device) for state in facts.row_states},
    )
    batch = batches.batch(num_seqs, num_tokens)
    # Tensors of their own: torch.compile would make the offsets in a shared buffer an input of what it compiles.
    own = {name: getattr(batch, name).clone() for name in field_names(StepBatch)}
    batch = replace(batch, **own)
    cache = KVCache(facts.layers, 0, shape.block_size, facts.cache_dtype, device)  # the trash block alone
    runner = PagedModelRunner(model, cache, backend, facts)
    return lambda: runner.logits(batch)


def measure_step_bytes(step: Callable[[], torch.Tensor], device: torch.device, shape: StepShape) -> int:
    """Bytes that the largest step allocates while it runs; 0 on the CPU, which has them to spare.

    Leaves none of it allocated, so that what the device then calls free is.
    """
    if device.type != "cuda":
        return 0
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    vocab_size = step().shape[1]
    model_bytes = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return model_bytes + sampler_bytes(shape, vocab_size)


def find_wait(step: Callable[[], torch.Tensor], device: torch.device) -> str | None:
    """What in a step waits for the device, as torch says it; None if nothing does. Such a step cannot be captured.

    An attempt to capture it would tell as well, but leave torch's allocators unusable. Run the step once before: what
    it does for the first time may wait. What it computed in is given back, too.
    """
    if device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.empty_cache()
    return None
