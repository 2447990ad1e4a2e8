"""Configuration of the scheduler: [scheduler] and [ring], its counters, and its bootstrap."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from ipc.records import StepShape
from ipc.stats_page import ArrayShapes
from workers.bootstrap import WorkerBootstrap
from workers.queueing.config import PolicyConfig

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
    "num_excluded",  # sequences whose parameters or whose grammar's mask exclude every token
    "num_structured_unfinished",  # admitted sequences with a grammar that do not end with "stop"
    "num_preemptions", "num_cached_tokens",
    "num_cached_blocks", "plan_ns", "apply_ns",
    # The device's time, from the result records: busy, or idle for one of four reasons (`results/device_time.py`).
    "device_busy_ns", "device_no_work_ns", "device_scheduler_ns", "device_copies_ns", "device_masks_ns",
    "device_last_end_ns",
)  # fmt: skip

# Times are CLOCK_MONOTONIC; `results/device_time.py` explains them. A step without masks has no pause: both are 0.
RECENT_STEP_FIELDS: Final = (
    "ticket", "work_since_ns", "plan_ns", "planned_ns", "received_ns", "start_ns", "end_ns", "pause_ns", "resume_ns",
    "apply_ns", "applied_ns", "num_seqs", "num_tokens",
)  # fmt: skip
RECENT_STEPS: Final = "recent_steps"  # see `results/step_times.py`
ARRAYS: Final[ArrayShapes] = ((RECENT_STEPS, (2_048, len(RECENT_STEP_FIELDS))),)

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


class GrammarLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What the scheduler must know of [grammar]."""

    mask_timeout_s: float = 0.1
    compile_timeout_s: float = 1.0


class SchedulerBootstrap(msgspec.Struct, frozen=True, kw_only=True):
    """The number of KV blocks arrives later, with `Start` (`info["num_blocks"]`).

    Rings: writes `step` and every `mask_request` ring, reads and releases `result` and every `prompt` ring, of which it
    writes the first. Sockets: binds `schedule`, connects to `detokenize`.
    """

    worker: WorkerBootstrap
    scheduler: SchedulerConfig
    shape: StepShape
    depth: int
    eos_token_ids: list[int]
    grammar: GrammarLimits = GrammarLimits()
    restart_window_s: float = 300.0  # supervisor.window_s: two deaths of the GPU process within it are suspicious
