"""`/health`, `/ready` and `/version`, for load balancers and people."""

from __future__ import annotations

import importlib.metadata
from functools import cache
from typing import Any

from ipc.errors import RingfeedError
from pipeline.http.transport import Call, Reply


async def health(call: Call) -> Reply:
    """Status 200 while the engine can answer requests or will soon; 503 if it has failed or does not answer."""
    state, detail = await _state(call)
    return Reply(_body(call, state, detail), 503 if state in ("failed", "unreachable") else 200)


async def ready(call: Call) -> Reply:
    """Status 200 while the engine accepts requests; 503 while it starts, recovers, drains, has failed or does not
    answer."""
    state, detail = await _state(call)
    return Reply(_body(call, state, detail), 200 if state == "ready" else 503)


async def version(_: Call) -> Reply:
    """The version of ringfeed."""
    return Reply({"version": version_number()})


@cache
def version_number() -> str:
    """The version of the installed package; "unknown" in a checkout that is not installed."""
    try:
        return importlib.metadata.version("ringfeed")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


async def _state(call: Call) -> tuple[str, str]:
    try:
        found = await call.service.client.health()
    except RingfeedError as error:
        return "unreachable", str(error)
    return found.state, found.detail


def _body(call: Call, state: str, detail: str) -> dict[str, Any]:
    return {"status": state, "detail": detail, "model": call.service.model_names[0]}
