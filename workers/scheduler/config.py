"""Configuration of the scheduler: [scheduler] and [ring], and what it is given at birth."""

from __future__ import annotations

import msgspec

from ipc.records import StepShape
from ipc.ring import RingHandle
from workers.process import WorkerBootstrap
from workers.queueing.policies import PolicyConfig


class SchedulerConfig(PolicyConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """[scheduler]: bounds on what runs and what waits; `PolicyConfig` has the rest of the section.

    Args:
        max_num_seqs: sequences that hold a row (running or preempted) at a time.
        max_num_batched_tokens: tokens computed in one step.
        max_model_len: prompt + output tokens of one sequence; None = what the model can.
        max_num_waiting: requests that may wait for a row, each of n samples counted; one more is refused at once.
        max_num_waiting_tokens: of their prompts, together; None = no bound. A prompt that finds nobody waiting is taken
            whatever its length.
        max_itl_ms: time between two tokens of a stream that prompts computed beside it should not exceed: they are cut
            into chunks that fit, by what steps have been found to take. None = chunks fill max_num_batched_tokens.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 1024
    max_model_len: int | None = None
    max_num_waiting: int = 16_384
    max_num_waiting_tokens: int | None = None
    max_itl_ms: float | None = None


class RingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """[ring].

    Args:
        depth: steps that are published before the first of them is applied: 1 = synchronous, 2 = the GPU computes
            one while the host prepares the next.
    """

    depth: int = 2


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
