"""The detokenizer's counters and its bootstrap."""

from __future__ import annotations

from typing import Final

import msgspec

from workers.bootstrap import WorkerBootstrap

COUNTERS: Final = ("num_open", "num_tokens", "num_outputs", "num_finished", "num_undelivered")


class DetokenizerBootstrap(msgspec.Struct, frozen=True, kw_only=True):
    """Sockets: binds `detokenize`; connects to `schedule` and `deliver`."""

    worker: WorkerBootstrap
    model_path: str  # a folder
    client_window: int  # Outputs messages under way to one client before its further tokens wait and coalesce
