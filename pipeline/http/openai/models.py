"""`/v1/models`: the names of the one model that the engine serves, in the form of OpenAI's or of Anthropic's API."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from pipeline.http.transport import Call, Reply

_ANTHROPIC_HEADER: Final = "anthropic-version"  # each request of an Anthropic client has it


async def list_models(call: Call) -> Reply:
    """All names of the model, each as a model of its own. `max_model_len` is vLLM's addition."""
    names = call.service.model_names
    data = [_model(call, name) for name in names]
    if _ANTHROPIC_HEADER in call.headers:
        return Reply({"data": data, "has_more": False, "first_id": names[0], "last_id": names[-1]})
    return Reply({"object": "list", "data": data})


async def retrieve_model(call: Call) -> Reply:
    """One model by its id, which may hold slashes."""
    return Reply(_model(call, call.service.check_model(call.path_params["model"])))


def _model(call: Call, name: str) -> dict[str, Any]:
    service = call.service
    if _ANTHROPIC_HEADER in call.headers:
        return {
            "id": name, "type": "model", "display_name": name, "lifecycle": "active",
            "created_at": datetime.fromtimestamp(service.started_at, UTC).isoformat(),
            "max_input_tokens": service.max_model_len, "max_tokens": service.max_model_len,
        }  # fmt: skip
    return {
        "id": name, "object": "model", "created": service.started_at, "owned_by": "ringfeed",
        "root": service.model_names[0], "parent": None, "max_model_len": service.max_model_len,
    }  # fmt: skip
