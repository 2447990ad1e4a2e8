"""Configuration of the GPU process: [model] and [cache], its counters, and its bootstrap."""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from ipc.records import StepShape
from workers.bootstrap import WorkerBootstrap
from workers.gpu.startup_stages import COUNTERS as STARTUP_COUNTERS

VARLEN_BLOCK_TOKENS: Final = 256  # FlashAttention reads blocks of this size or a multiple of it
COUNTERS: Final = ("num_steps", "launch_ns", "num_rows", "num_late_masks", "mask_wait_ns", *STARTUP_COUNTERS)
RECORDING: Final = "recording"  # the file of `--record`, among the descriptors that the launcher lends
COMPLETION: Final = "completion"  # the thread that waits for the device and publishes results


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which model runs, and how it is computed."""

    path: Annotated[
        str,
        Meta(
            description="A folder with `config.json`, weights and tokenizer, or a Hugging Face hub id "
            "(`organization/name`). A relative path in a file starts at the folder of that file; with `--set`, in a "
            "dictionary and in a configuration from standard input it starts at the current folder. `~` is your home "
            "folder."
        ),
    ]
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Meta(
            description="Type of weights, activations and, unless `cache.dtype` differs, KV cache. `auto`: the type "
            "that `config.json` names."
        ),
    ] = "auto"
    device: Annotated[
        Literal["auto", "cpu", "cuda"], Meta(description="`auto`: CUDA if the machine has it, the CPU otherwise.")
    ] = "auto"
    load_format: Annotated[
        Literal["safetensors", "dummy", "null"],
        Meta(
            description="`safetensors`: the weights in the folder. `dummy`: random weights, made from `config.json` "
            "alone. `null`: no model. Every step takes `null_step_ms` of simulated device time and samples made-up "
            "tokens; use it to measure the host."
        ),
    ] = "safetensors"
    attention: Annotated[
        Literal["auto", "torch", "triton", "varlen"],
        Meta(
            description="What computes attention. `auto`: `triton` on CUDA, `torch` on the CPU. `torch`: plain torch "
            "operations. `triton`: ringfeed's own Triton kernels. `varlen`: torch's own FlashAttention; it needs CUDA, "
            f"torch >= 2.13 and a `cache.block_size` of {VARLEN_BLOCK_TOKENS} or a multiple of it."
        ),
    ] = "auto"
    compile: Annotated[
        Literal["auto", "on", "off"],
        Meta(
            description="Compile the decoder layers with `torch.compile`. `auto`: on with CUDA, off on the CPU. The "
            "result is kept in `~/.cache/ringfeed` for the next start."
        ),
    ] = "auto"
    quantization: Annotated[
        Literal["none", "fp8"],
        Meta(
            description="`fp8`: round the weights of the decoder layers to 8 bits while the model loads (float8 e4m3, "
            "a scale for each output channel). Decode steps then read about half the bytes, and answers change a "
            "little. In steps of more than 64 tokens, a GPU with products in fp8 rounds activations too. The output "
            "head, the routers of experts, and experts in one tensor stay as they are. `none`: weights as they are "
            "stored."
        ),
    ] = "none"
    num_threads: (
        Annotated[int, Meta(ge=1, le=1024, description="Threads of CPU computation. Not set: one per core.")] | None
    ) = None
    null_step_ms: Annotated[
        float,
        Meta(
            ge=0,
            le=60_000,
            description='Simulated device time of a step in milliseconds. It needs `load_format = "null"`.',
        ),
    ] = 0.0
    null_vocab_size: Annotated[
        int,
        Meta(
            ge=1,
            le=1_048_576,
            description='Tokens that the simulated model of `load_format = "null"` chooses from: the first of the '
            "vocabulary.",
        ),
    ] = 64
    profile_path: (
        Annotated[
            str,
            Meta(
                description="For measurements: write a profile of some early steps to this JSON file. It tells how "
                "busy the device was, and with which kernels. Profiling slows the engine down, and stops it once for "
                "seconds."
            ),
        ]
        | None
    ) = None


class CacheConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The paged KV cache."""

    dtype: Annotated[
        Literal["auto", "fp8_e4m3"],
        Meta(
            description="Type of the stored keys and values. `auto`: the type that the model computes them in. "
            "`fp8_e4m3`: 8 bits, so the same memory holds twice as many tokens of a 16-bit model, and attention reads "
            "half as many bytes. It rounds each stored number to 4 significant bits, an error of at most 6 %, which "
            "changes the model's output slightly. The numbers are stored divided by a scale, one for the keys and one "
            "for the values of each layer. The scales come from the checkpoint (`k_scale`, `v_scale` or "
            "`output_scale`), and are 1 where it has none. Numbers beyond 448 times the scale are stored as that "
            "limit. On a GPU it needs compute capability 8.9 or later."
        ),
    ] = "auto"
    block_size: Annotated[int, Meta(ge=1, le=1024, description="Tokens in one block.")] = 16
    num_blocks: (
        Annotated[
            int,
            Meta(
                ge=1,
                le=2**31 - 2,
                description="Blocks of the cache. Not set: as many as `memory_share` allows, and at most enough for "
                "`scheduler.max_num_seqs` sequences of full length.",
            ),
        ]
        | None
    ) = None
    memory_share: Annotated[
        float,
        Meta(
            gt=0,
            le=1,
            description="Share of the free memory that the cache may take, measured after the model is loaded: memory "
            "of the GPU, or on the CPU the available memory of the machine. It has no effect if `num_blocks` is set.",
        ),
    ] = 0.9
    prefix_caching: Annotated[
        bool,
        Meta(
            description="Keep the KV of full blocks, and reuse it for later requests that begin with the same tokens. "
            "`cache_salt` of a request keeps tenants apart; `clear_cache()` of a client empties the cache."
        ),
    ] = True


class GpuBootstrap(msgspec.Struct, frozen=True, kw_only=True):
    """`worker.index` is the rank of this process.

    Rings: reads `step`, every `prompt` ring and every `mask` ring by ticket. `prompt` ring 0 is the scheduler's upload
    ring, the others are the tokenizers', in order. `mask` rings are the grammar workers', in order. Rank 0 also
    releases `step` and the `mask` rings, and writes `result`, which no other rank has. Rank 0 writes the recording.
    """

    worker: WorkerBootstrap
    model: ModelConfig
    cache: CacheConfig
    shape: StepShape
    depth: int
    mask_timeout_s: float = 0.1  # after that long, a step goes on without the masks that it lacks
    # Of the first start, as its `Ready.info` said: the KV blocks, and the bytes of the device that the process took.
    num_blocks: int | None = None
    device_bytes: int = 0
    record_limit_bytes: int = 0  # of the file that `worker.kept` names as RECORDING
