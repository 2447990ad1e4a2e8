"""Configuration of the scheduler: the sections [scheduler] and [ring], and the process's bootstrap."""

from __future__ import annotations

import msgspec

from ipc.records import StepShape
from ipc.ring import RingHandle
from workers.process import WorkerBootstrap
from workers.queueing.policies import PolicyConfig


class SchedulerConfig(PolicyConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """[scheduler]: bounds on running and waiting requests. `PolicyConfig` has the rest of the section.

    Args:
        max_num_seqs: largest number of sequences that have a row, running or preempted.
        max_num_batched_tokens: largest number of tokens that one step computes.
        max_model_len: largest number of tokens, prompt and output, of one sequence; None = the model's own limit.
        max_num_waiting: largest number of requests that wait for a row, where a request counts once for each of its n
            samples. Further requests are refused at once.
        max_num_waiting_tokens: largest number of prompt tokens of waiting requests; None = no limit. While no request
            waits, a prompt of any length is accepted.
        max_itl_ms: target for the time between two tokens of a stream while other prompts are computed. Prompts are cut
            into chunks that keep it, by the measured times of earlier steps. None = chunks fill max_num_batched_tokens.
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
        depth: largest number of steps in flight, that is, published and not applied. 1 = synchronous; 2 = the host
            prepares a step while the GPU computes the one before it.
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
