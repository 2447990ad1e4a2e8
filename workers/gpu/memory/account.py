"""Accounts for a device's memory: the parts that are allocated, and the reserve for parts that are allocated later.

    weights | KV blocks | the executor's tables | graphs and what they compute in | what eager steps compute in | free

Weights take what they need, and the cache a share of what is then free, less the reserve. The largest step is measured;
the reserve for tables and graphs is estimated. A log line reports the actual sizes after start-up.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from ipc.records import StepShape
from workers.gpu.execution.buckets import MAX_CAPTURED_TOKENS, Buckets
from workers.gpu.execution.prompt_logprobs import max_logits_rows
from workers.gpu.execution.row_state import RowState
from workers.gpu.execution.row_tables import table_bytes
from workers.gpu.execution.step_masks import mask_bytes
from workers.gpu.memory.kv_cache import free_memory_bytes
from workers.gpu.sampling.logprobs import PROCESSED_BYTES, PROCESSED_ROWS

GIB: Final = 1 << 30
_GRAPH_BYTES_PER_LAYER: Final = 256 << 10  # the driver's memory for the launches of a decoder layer; a generous guess
_LOGIT_BYTES: Final = 8  # of the model's logits, at most four, and of the adjusted ones
SAMPLER_BYTES: Final = 10  # per logit: two float32 for log-probabilities, and a little for the search of the largest


@dataclass(frozen=True)
class MemoryUse:
    """The device's memory by use, in bytes; 0 = not known yet, or nothing."""

    weights: int = 0
    largest_step: int = 0  # its temporary tensors
    graphs: int = 0
    kv_blocks: int = 0

    def __str__(self) -> str:
        parts = {"weights": self.weights, "largest step": self.largest_step, "graphs": self.graphs}
        parts["KV blocks"] = self.kv_blocks
        return ", ".join(f"{name} {num_bytes / GIB:.2f} GiB" for name, num_bytes in parts.items())


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers. Memory that several of them share counts once."""
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def sampler_bytes(shape: StepShape, vocab_size: int) -> int:
    """Bytes of the temporary tensors of the most demanding sampler, or of prompts' log-probabilities if these take
    more."""
    num_processed = min(PROCESSED_ROWS, shape.max_num_seqs)
    sampler = SAMPLER_BYTES * shape.max_num_seqs + PROCESSED_BYTES * num_processed
    return max(sampler, SAMPLER_BYTES * max_logits_rows(shape)) * vocab_size


def reserved_bytes(
    shape: StepShape,
    num_layers: int,
    vocab_size: int,
    step_bytes: int,
    device: torch.device,
    *,
    captures: bool,
    row_states: Sequence[RowState] = (),
) -> int:
    """Bytes that are allocated after the cache: the executor's tables, graphs, and the largest step's temporary
    tensors.

    `step_bytes` are those of the largest step, sampler included. All graphs share one pool, sized for the largest
    graph: the model's part is an eager step's, scaled to the graph's tokens, plus the whole sampler. `row_states` are
    the model's. Returns 0 on the CPU, which needs no reserve.
    """
    if device.type == "cpu":
        return 0
    logits = _LOGIT_BYTES * shape.max_num_seqs * vocab_size
    graphs = 0
    if captures:
        sampler = sampler_bytes(shape, vocab_size)
        num_tokens = shape.max_num_batched_tokens
        pool = sampler + (step_bytes - sampler) * min(MAX_CAPTURED_TOKENS, num_tokens) // num_tokens
        graphs = pool + len(Buckets(shape).captured) * num_layers * _GRAPH_BYTES_PER_LAYER
    tables = table_bytes(shape, vocab_size, row_states) + mask_bytes(shape)
    return step_bytes + tables + logits + graphs


def bytes_taken(device: torch.device, work: Callable[[], None]) -> int:
    """Run `work`, and return by how many bytes the device's free memory shrank. Memory that torch keeps for reuse is
    free."""
    if device.type != "cuda":
        work()
        return 0
    torch.cuda.empty_cache()
    before = free_memory_bytes(device)
    work()
    torch.cuda.empty_cache()
    return before - free_memory_bytes(device)


def free_text(device: torch.device) -> str:
    """Return a text such as "61.20 of 79.11 GiB are free"."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    else:
        free, total = free_memory_bytes(device), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{free / GIB:.2f} of {total / GIB:.2f} GiB are free"
