"""What the detokenizer is given at birth."""

from __future__ import annotations

import msgspec

from workers.process import WorkerBootstrap


class DetokenizerBootstrap(msgspec.Struct, frozen=True, kw_only=True):
    worker: WorkerBootstrap
    model_path: str  # a folder
    detokenize_endpoint: str  # ROUTER, bound here: scheduler and gateway connect
    schedule_endpoint: str
    deliver_endpoint: str  # the gateway's ROUTER
    client_window: int  # Outputs messages under way to one client before its further tokens wait and coalesce
