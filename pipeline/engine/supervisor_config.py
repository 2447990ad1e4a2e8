"""Configuration of the launcher: [supervisor]. What it does about processes that die or hang."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta


class SupervisorConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the launcher replaces processes that die or hang."""

    max_restarts: Annotated[
        int,
        Meta(
            ge=0,
            le=10_000,
            description="Most restarts of one role within `window_s`. With one more the engine ends: every open "
            "request gets an error, and the exit status is 1. 0: nothing is started again.",
        ),
    ] = 20
    window_s: Annotated[
        float,
        Meta(gt=0, le=86_400, description="Length of time, in seconds, in which restarts are counted."),
    ] = 300.0
    hang_timeout_s: Annotated[
        float,
        Meta(
            ge=1,
            le=86_400,
            description="A process that answers nothing for so long is killed and started again, and so is a GPU "
            "process whose steps do not end.",
        ),
    ] = 30.0
    start_timeout_s: Annotated[
        float,
        Meta(
            ge=1,
            le=86_400,
            description="Longest time that a process may take to start, loading of the model included.",
        ),
    ] = 600.0
    spare_gpu_process: Annotated[
        bool,
        Meta(
            description="Keep a process that has imported everything, to take the place of a GPU process that dies. It "
            "saves the time of the imports and costs host memory.",
        ),
    ] = False
