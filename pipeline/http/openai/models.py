"""`/v1/models`: the names of the one model that the engine serves."""

from __future__ import annotations

from typing import Any

from pipeline.http.service import Service
from pipeline.http.transport import Call, Reply


async def list_models(call: Call) -> Reply:
    """All names of the model, each as a model of its own. `max_model_len` is vLLM's addition."""
    service = call.service
    return Reply({"object": "list", "data": [_model(service, name) for name in service.model_names]})


async def retrieve_model(call: Call) -> Reply:
    """One model by its id, which may hold slashes."""
    return Reply(_model(call.service, call.service.check_model(call.path_params["model"])))


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name, "object": "model", "created": service.started_at, "owned_by": "ringfeed",
        "root": service.model_names[0], "parent": None, "max_model_len": service.max_model_len,
    }  # fmt: skip
