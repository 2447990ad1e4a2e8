"""Runs the largest possible step on padding, before the size of the cache is chosen.

The step shows how much memory it takes beside weights and KV cache, and whether it waits for the device. The model is
also compiled on it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ipc.records import StepShape
from workers.gpu.attention.backend import AttentionBackend
from workers.gpu.execution.prompt_logprobs import max_logits_rows
from workers.gpu.execution.step_batch import BatchBuffers
from workers.gpu.memory.account import sampler_bytes
from workers.gpu.memory.kv_cache import KVCache
from workers.gpu.memory.out_of_memory import is_out_of_memory
from workers.gpu.model.paged_runner import PagedModelRunner
from workers.gpu.model.probed_model import ProbedModel


def largest_step(
    model: nn.Module, facts: ProbedModel, shape: StepShape, device: torch.device, backend: AttentionBackend
) -> Callable[[], torch.Tensor]:
    """Return a function that runs the model on the largest step of `shape`, with a cache of one block, and returns
    logits.

    The step also computes log-probabilities of prompts, whose logits may be more than those of its sequences.
    """
    num_seqs, num_tokens = shape.max_num_seqs, shape.max_num_batched_tokens

    batches = BatchBuffers(
        shape,
        lambda num_bytes: torch.zeros(num_bytes, dtype=torch.uint8, device=device),
        torch.zeros((1, shape.max_blocks_per_seq), dtype=torch.int32, device=device),
        {state.name: torch.zeros((1, *state.shape), dtype=state.dtype, device=device) for state in facts.row_states},
    )
    batch = batches.batch(num_seqs, num_tokens)
    cache = KVCache(
        facts.layers, 0, shape.block_size, facts.cache_dtype, device, facts.kv_scales
    )  # only the trash block
    runner = PagedModelRunner(model, cache, backend, facts)
    num_rows = max_logits_rows(shape)

    def run() -> torch.Tensor:
        (logits,) = runner.prompt_logits(batch, batch.positions[:num_rows], num_rows)
        return logits

    return run


def measure_step_bytes(step: Callable[[], torch.Tensor], device: torch.device, shape: StepShape) -> int:
    """Return the bytes that the largest step allocates while it runs; 0 on the CPU, which needs no reserve.

    Frees these bytes again, so that the device reports them as free.
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
    """Return torch's message about an operation of the step that waits for the device; None if no operation does.

    A step that waits cannot be captured in a graph. An attempt to capture it would also show this, but would leave
    torch's allocators unusable. Run the step once before, because a first run may wait for other reasons. Frees the
    step's memory.
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
