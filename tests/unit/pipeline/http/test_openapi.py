"""The OpenAPI document says what the application does."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from ipc.errors import EngineUnavailable, InvalidRequest, QueueFull
from pipeline.http.app import ROUTES
from pipeline.http.openapi import make_document
from tests.unit.pipeline.http.application import app_of, ask, request
from tests.unit.pipeline.http.fake_engine import FakeEngine

MESSAGES = [{"role": "user", "content": "hi"}]
BODIES: dict[str, dict[str, Any]] = {  # of each endpoint that reads one
    "/v1/completions": {"prompt": ["a", "b"], "max_tokens": 1},
    "/v1/chat/completions": {"messages": MESSAGES, "response_format": {"type": "text"}, "tools": []},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": MESSAGES, "tools": [{"name": "now", "input_schema": {}}]},
    "/v1/responses": {"input": "hi", "store": False},
    "/v1/responses/input_tokens": {"input": [{"role": "user", "content": "hi"}]},
    "/tokenize": {"messages": MESSAGES},
    "/detokenize": {"tokens": [1]},
}
DOCUMENT = make_document(ROUTES, with_keys=False)


def resolved(value: Any, document: dict[str, Any] = DOCUMENT) -> Any:
    """The value with the targets of its references in place of these."""
    if isinstance(value, list):
        return [resolved(each, document) for each in value]
    if not isinstance(value, dict):
        return value
    if "$ref" in value:
        target: Any = document
        for part in value["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        return resolved(target, document)
    return {key: resolved(each, document) for key, each in value.items()}


def body_schema(path: str) -> dict[str, Any]:
    schema: dict[str, Any] = resolved(DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"])
    return schema["schema"]  # type: ignore[no-any-return]


def test_the_document_has_every_route_and_its_references_lead_somewhere() -> None:
    answer = request(app_of(FakeEngine()), "GET", "/openapi.json")
    assert answer.json() == DOCUMENT
    operations = resolved(answer.json())["paths"]
    assert sum(len(of_path) for of_path in operations.values()) == len(ROUTES)
    ids = [operation["operationId"] for of_path in operations.values() for operation in of_path.values()]
    assert len(set(ids)) == len(ids)
    assert all(operation["description"] for of_path in operations.values() for operation in of_path.values())


@pytest.mark.parametrize("path", BODIES)
def test_the_body_in_the_document_is_the_body_that_the_endpoint_reads(path: str) -> None:
    schema = body_schema(path)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(BODIES[path], schema)
    app = app_of(FakeEngine())
    for name in schema["properties"]:
        answer = ask(app, path, {name: {"no": ["such"]}} | {key: {} for key in schema["required"]})
        assert "is no field" not in answer.json()["error"]["message"], name
    assert "is no field" in ask(app, path, {"unheard_of": 1}).json()["error"]["message"]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidRequest("top_p (3) must lie in (0, 1]"), 400),
        (QueueFull("the queue is full", 2.0), 429),
        (EngineUnavailable("the engine is draining"), 503),
        (ZeroDivisionError(), 500),
    ],
)
def test_answers_and_errors_have_the_documented_schema(path: str, error: Exception, status: int) -> None:
    responses = resolved(DOCUMENT["paths"][path]["post"]["responses"])
    answer = ask(app_of(FakeEngine()), path, BODIES[path])
    assert answer.status_code == 200
    jsonschema.validate(answer.json(), responses["200"]["content"][answer.headers["content-type"]]["schema"])
    if str(status) in responses:  # the queue refuses only what generates
        failed = ask(app_of(FailingEngine(error)), path, BODIES[path])
        assert failed.status_code == status
        documented = responses[str(status)]["content"][failed.headers["content-type"]]["schema"]
        jsonschema.validate(failed.json(), documented)


class FailingEngine(FakeEngine):
    """Answers nothing."""

    def __init__(self, error: Exception) -> None:
        super().__init__([error])
        self._error = error

    async def tokenize(self, prompt: Any, *, add_special_tokens: bool = True) -> Any:
        raise self._error

    async def detokenize(self, token_ids: Any) -> str:
        raise self._error


def test_the_document_asks_for_keys_only_where_the_server_does() -> None:
    document = make_document(ROUTES, with_keys=True)
    assert set(document["components"]["securitySchemes"]) == {"bearer", "x-api-key"}
    assert "securitySchemes" not in DOCUMENT["components"]
    app = app_of(FakeEngine(), keys=["secret"])
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert ("security" in operation) == ("401" in operation["responses"])
            if method == "post":
                guarded = ask(app, path, {}).status_code == 401
                assert guarded == ("security" in operation), path
    assert "security" not in document["paths"]["/health"]["get"]
    assert "security" in document["paths"]["/v1/models"]["get"]
