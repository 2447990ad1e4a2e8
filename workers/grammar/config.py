"""Configuration of the grammar processes: [grammar], their counters, and the bootstrap of each."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from ipc.records import StepShape
from workers.bootstrap import WorkerBootstrap

COUNTERS: Final = (
    "num_matchers",  # sequences whose grammar this process follows
    "num_compiled", "num_compile_errors", "compile_ns",  # from the request's message to its answer
    "num_mask_records", "num_masks", "mask_ns",  # from the wake-up to the published record
    "num_failed_matchers",
)  # fmt: skip


class GrammarConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The processes that compile the grammars of structured outputs and compute which tokens they allow."""

    num_workers: Annotated[
        int,
        Meta(
            ge=0,
            le=64,
            description="Grammar processes. 0: the engine refuses requests with `structured_outputs`.",
        ),
    ] = 1
    mask_timeout_s: Annotated[
        float,
        Meta(
            gt=0,
            le=60,
            description="Longest time that the GPU process waits for the token masks of a step. Then the sequences "
            "whose masks are missing end with an error, and the step goes on.",
        ),
    ] = 0.1
    compile_timeout_s: Annotated[
        float,
        Meta(
            gt=0,
            le=600,
            description="Longest time to compile one grammar. Then the requests that wait for it end with an error.",
        ),
    ] = 1.0


class GrammarBootstrap(msgspec.Struct, frozen=True, kw_only=True):
    """Rings: reads and releases its `mask_request` ring, writes its `mask` ring. Sockets: connects to `schedule`."""

    worker: WorkerBootstrap
    model_path: str  # a folder
    shape: StepShape
    compile_timeout_s: float
