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
    # The device's time, from the result records: busy, or idle for one of three reasons (`device_time.py`).
    "device_busy_ns", "device_no_work_ns", "device_scheduler_ns", "device_copies_ns", "device_last_end_ns",
)  # fmt: skip


class SchedulerConfig(PolicyConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """[scheduler]: bounds on what runs and what waits; `PolicyConfig` has the rest of the section.

    Args:
        max_num_seqs: sequences that hold a row (running or preempted) at a time.
        max_num_batched_tokens: tokens computed in one step.
        max_model_len: prompt + output tokens of one sequence; None = what the model can.
        max_num_waiting: requests that may wait for a row; each of n samples counts. The scheduler refuses more.
        max_num_waiting_tokens: tokens of their prompts together; None = no bound. If no request waits, the scheduler
            accepts a prompt of any length.
        max_itl_ms: bound on the time between two tokens of a stream while prompts are computed beside it. The scheduler
            cuts prompts into chunks that fit, by the measured times of steps. None = chunks fill
            max_num_batched_tokens.
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
        depth: steps that may be published before the first of them is applied: 1 = synchronous, 2 = the GPU computes
            a step while the host prepares the next.
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
