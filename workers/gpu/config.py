"""Configuration of the GPU process: [model] and [cache], its counters, and its bootstrap."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from ipc.records import StepShape
from workers.bootstrap import WorkerBootstrap

VARLEN_BLOCK_TOKENS: Final = 256  # FlashAttention reads blocks of this size or a multiple of it
COUNTERS: Final = ("num_steps", "launch_ns", "num_rows", "load_ns")
COMPLETION: Final = "completion"  # the thread that waits for the device and publishes results


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """[model]: what runs, and where.

    Args:
        path: a folder with config.json (and weights and a tokenizer), or a hub id.
        dtype: of weights, activations and KV cache; "auto" = what config.json says.
        device: "auto" = CUDA where there is one, else the CPU.
        load_format: "safetensors" = the folder's weights; "dummy" = random ones from config.json alone; "null" = no
            model: every step takes `null_step_ms` of device time and samples made-up tokens (to measure the host).
        attention: what computes attention; "auto" = Triton kernels on CUDA, else plain torch. "varlen" = torch's own
            FlashAttention, on CUDA, with torch >= 2.13 and a `cache.block_size` that is a multiple of
            `VARLEN_BLOCK_TOKENS`.
        compile: torch.compile the decoder layers; "auto" = on CUDA.
        num_threads: threads of CPU computation; None = one per core.
        null_step_ms: device time of a step with load_format "null".
        profile_path: a JSON file to write about some early steps: how busy the device was, with which kernels
            (`profiling/step_profiler.py`). For measurements: it slows the engine down and halts it for seconds once.
    """

    path: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    load_format: Literal["safetensors", "dummy", "null"] = "safetensors"
    attention: Literal["auto", "torch", "triton", "varlen"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    num_threads: int | None = None
    null_step_ms: float = 0.0
    profile_path: str | None = None


class CacheConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """[cache]: the paged KV cache.

    Args:
        block_size: tokens per block.
        num_blocks: how many blocks; None = as many as fit in `memory_share`.
        memory_share: share of the device's free memory after loading that the blocks may take (of the machine's
            available memory, on the CPU).
        prefix_caching: keep the KV of full blocks for later requests that begin with the same tokens.
    """

    block_size: int = 16
    num_blocks: int | None = None
    memory_share: float = 0.9
    prefix_caching: bool = True


class GpuBootstrap(msgspec.Struct, frozen=True, kw_only=True):
    """`worker.index` is the rank of this process.

    Rings: reads `step` and every `prompt` ring by ticket. `prompt` ring 0 is the scheduler's upload ring, the others
    are the tokenizers', in order. Rank 0 also releases `step` and writes `result`, which no other rank has.
    """

    worker: WorkerBootstrap
    model: ModelConfig
    cache: CacheConfig
    shape: StepShape
    depth: int
