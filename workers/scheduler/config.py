"""Configuration of the scheduler: [scheduler] and [ring], and what it is given at birth."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from ipc.records import StepShape
from ipc.ring import RingHandle
from workers.process import WorkerBootstrap
from workers.queueing.policies import PolicyConfig

MAX_MODEL_LEN: Final = 16_777_216


class SchedulerConfig(PolicyConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What runs at the same time, what may wait, and in which order."""

    max_num_seqs: Annotated[
        int,
        Meta(
            ge=1,
            le=65_536,
            description="Sequences that are admitted at the same time: they run, or are preempted. Further sequences "
            "wait.",
        ),
    ] = 64
    max_num_batched_tokens: Annotated[
        int,
        Meta(
            ge=1,
            le=1_048_576,
            description="Tokens computed in one step. Longer prompts are computed in chunks. At least `max_num_seqs`, "
            "so that every sequence can decode in one step.",
        ),
    ] = 1024
    max_model_len: (
        Annotated[
            int,
            Meta(
                ge=2,
                le=MAX_MODEL_LEN,
                description="Prompt and output tokens of one sequence together. Not set: as many as the model can.",
            ),
        ]
        | None
    ) = None
    max_num_waiting: Annotated[
        int,
        Meta(
            ge=1,
            le=16_777_216,
            description="Requests that may wait in the scheduler; a request with `n` samples counts `n` times. The "
            "engine refuses more at once with `QueueFull`, which says when to try again.",
        ),
    ] = 16_384
    max_num_waiting_tokens: (
        Annotated[
            int,
            Meta(
                ge=1,
                le=2**40,
                description="Prompt tokens of all waiting requests together. The engine refuses more at once. It "
                "always accepts a prompt while no other request waits. Not set: no bound.",
            ),
        ]
        | None
    ) = None
    max_itl_ms: (
        Annotated[
            float,
            Meta(
                ge=0.1,
                le=60_000,
                description="Inter-token latency: the time between two tokens of a stream, in milliseconds, that "
                "prompts computed beside it should not exceed. The scheduler cuts prompts into chunks that fit, from "
                "measured step times. Not set: chunks fill `max_num_batched_tokens`.",
            ),
        ]
        | None
    ) = None


class RingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The rings between the scheduler and the GPU process."""

    depth: Annotated[
        int,
        Meta(
            ge=1,
            le=8,
            description="Steps on their way to the device. 1: synchronous. 2: the device computes one step while the "
            "host prepares the next.",
        ),
    ] = 2


class SchedulerBootstrap(msgspec.Struct, frozen=True, kw_only=True):
    """The number of KV blocks arrives later, with `Start` (`info["num_blocks"]`). Rings as in the GPU process's."""

    worker: WorkerBootstrap
    scheduler: SchedulerConfig
    shape: StepShape
    depth: int
    eos_token_ids: list[int]
    step_ring: RingHandle
    result_ring: RingHandle
    prompt_rings: list[RingHandle]  # [0] is the scheduler's own
    schedule_endpoint: str  # ROUTER, bound here
    detokenize_endpoint: str
    gateway_identity: bytes  # under which the gateway connects to `schedule_endpoint`
    gpu_doorbell_fd: int
    tokenizer_doorbell_fds: list[int]
