"""Configuration of the scheduler: [scheduler] and [ring], its counters, and its bootstrap."""

from __future__ import annotations

from typing import Final

import msgspec

from ipc.records import StepShape
from workers.bootstrap import WorkerBootstrap
from workers.queueing.policies import PolicyConfig

COUNTERS: Final = (
    "num_waiting", "num_waiting_tokens", "num_running", "num_preempted", "num_blocks", "num_free_blocks",
    "num_free_rows",
    # Records that the rings hold and that are not released, like "num_prompt_records" of a tokenizer. A record of the
    # result ring counts from the moment its step is published, because it is reserved for that step.
    "num_step_records", "num_result_records", "num_upload_records",
    "num_steps",
    "num_prefill_steps",  # steps that compute prompts, with or without sequences that decode beside them
    "num_sampled_tokens", "num_prompt_tokens", "num_admitted", "num_finished", "num_cancelled",
    "num_refused", "num_queue_full", "num_deadline", "num_queue_timeout", "num_not_finite",
    "num_preemptions", "num_cached_tokens",
    "num_cached_blocks", "plan_ns", "apply_ns",
    # The device's time, from the result records: busy, or idle for one of three reasons (`results/device_time.py`).
    "device_busy_ns", "device_no_work_ns", "device_scheduler_ns", "device_copies_ns", "device_last_end_ns",
)  # fmt: skip


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
    """The number of KV blocks arrives later, with `Start` (`info["num_blocks"]`).

    Rings: writes `step`, reads and releases `result` and every `prompt` ring, of which it writes the first. Sockets:
    binds `schedule`, connects to `detokenize`.
    """

    worker: WorkerBootstrap
    scheduler: SchedulerConfig
    shape: StepShape
    depth: int
    eos_token_ids: list[int]
