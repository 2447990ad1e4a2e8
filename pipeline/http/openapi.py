"""`/openapi.json`: the API as an OpenAPI 3.1 document, made from the table of routes and the structs of bodies.

The routes give paths, methods, parameters and error shapes, the structs give the schemas of bodies, and docstrings
give the descriptions. So the document cannot say anything else than the code does.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec
from starlette.routing import Route

from pipeline.http.engine_api.status import version_number
from pipeline.http.errors import ANTHROPIC, OPENAI, Dialect, HttpError
from pipeline.http.generation.sampling_fields import TENANT_HEADER
from pipeline.http.operation import Operation
from pipeline.http.transport import JSON, Call, Endpoint, Reply

_ABOUT: Final = (
    "A request with a field that would change the answer, and that this server does not know, is refused with status "
    "400. Fields of OpenAI's and Anthropic's APIs without an effect on the answer are accepted and ignored."
)
_TAGS: Final = {  # package of a handler: tag
    "openai": "OpenAI", "anthropic": "Anthropic", "engine_api": "engine", "metrics": "engine", "page": "page",
    "openapi": "engine",
}  # fmt: skip
_STATUSES: Final = {
    400: "The request is wrong. The message names the field, its value and the cure.",
    401: "The key is missing or wrong.",
    404: "The server has no such model, response or endpoint.",
    405: "The path does not take this method. The header Allow lists those that it takes.",
    408: "The request's `deadline_s` or `queue_timeout_s` passed before it had any output.",
    413: "The body is larger than `http.max_body_bytes`, or has too many values in its JSON.",
    429: "The engine's queue is full. The header Retry-After says when to send the request again.",
    431: "The headers are too large. The connection is closed after the answer, which is text.",
    500: "An error of the server. Its log has it under the request's id.",
    503: "The engine starts, drains, has failed or does not answer.",
}
_DIALECTS: Final = {"OpenAI": OPENAI, "Anthropic": ANTHROPIC}
_SECURITY: Final = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
_REQUEST_ID: Final = {
    "name": "X-Request-Id", "in": "header", "schema": {"type": "string", "maxLength": 256},
    "description": "The request's id in the server's log. The answer has it too. Left out: the server draws one.",
}  # fmt: skip
_TENANT: Final = {
    "name": TENANT_HEADER, "in": "header", "schema": {"type": "string"},
    "description": "The tenant that the scheduler counts the request for, unless the body has a `tenant`.",
}  # fmt: skip
_PATH_PARAMETER: Final = re.compile(r"{(\w+)(?::\w+)?}")
_RAISES: Final = re.compile(r"\s*Raises [^.]*\.")  # for readers of the code


async def document(call: Call) -> Reply:
    """This document. A process makes it at the first request."""
    state = call.scope["app"].state
    if not hasattr(state, "openapi"):
        routes = [route for route in call.scope["app"].routes if isinstance(route, Route)]
        state.openapi = msgspec.json.encode(make_document(routes, with_keys=bool(call.service.config.api_key_file)))
    return Reply(state.openapi)


def make_document(routes: Sequence[Route], *, with_keys: bool) -> dict[str, Any]:
    """The document as JSON values.

    Args:
        routes: their endpoints are `Endpoint`s.
        with_keys: the server has keys, so guarded paths need one.
    """
    bodies = {body for route in routes if (body := _endpoint(route).operation.body) is not None}
    _, schemas = msgspec.json.schema_components(
        sorted(bodies, key=lambda body: body.__name__), ref_template="#/components/schemas/{name}"
    )
    components: dict[str, Any] = {
        "schemas": schemas | {f"{name}Error": _error_schema(dialect) for name, dialect in _DIALECTS.items()},
        "responses": {
            f"{name}{status}": _error_response(name, status) for name in _DIALECTS for status in _STATUSES
        },
    }  # fmt: skip
    if with_keys:
        components["securitySchemes"] = _SECURITY
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        of_path = paths.setdefault(_PATH_PARAMETER.sub(r"{\1}", route.path), {})
        for method in (route.methods or set()) - {"HEAD"}:
            of_path[method.lower()] = _operation(route, method, with_keys=with_keys)
    return {
        "openapi": "3.1.0",
        "info": {"title": "ringfeed", "version": version_number(), "description": _ABOUT},
        "paths": paths,
        "components": components,
    }


def _endpoint(route: Route) -> Endpoint:
    assert isinstance(route.endpoint, Endpoint), "the table of routes has nothing else"
    return route.endpoint


def _operation(route: Route, method: str, *, with_keys: bool) -> dict[str, Any]:
    endpoint = _endpoint(route)
    operation = endpoint.operation
    package = endpoint.handler.__module__.removeprefix("pipeline.http.").partition(".")[0]
    text = _RAISES.sub("", inspect.getdoc(endpoint.handler) or "")
    path_parameters = _PATH_PARAMETER.findall(route.path)
    statuses = _statuses(operation, has_path_parameters=bool(path_parameters), with_keys=with_keys)
    dialect = next(name for name, each in _DIALECTS.items() if each is endpoint.dialect)
    value: dict[str, Any] = {
        "operationId": "_".join([method.lower(), *re.findall(r"\w+", _PATH_PARAMETER.sub(r"\1", route.path))]),
        "tags": [_TAGS[package]],
        "summary": text.partition("\n")[0],
        "description": text,
        "parameters": _parameters(operation, path_parameters),
        "responses": _answers(operation)
        | {str(status): {"$ref": f"#/components/responses/{dialect}{status}"} for status in statuses},
    }
    if operation.body is not None:
        schema = {"$ref": f"#/components/schemas/{operation.body.__name__}"}
        value["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
    if with_keys and operation.needs_key:
        value["security"] = [{name: []} for name in _SECURITY]
    return value


def _parameters(operation: Operation, path_parameters: Iterable[str]) -> list[dict[str, Any]]:
    return [
        *({"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in path_parameters),
        *(
            {"name": each.name, "in": "query", "schema": each.schema, "description": each.description}
            for each in operation.query
        ),
        _REQUEST_ID,
        *([_TENANT] if operation.generates else []),
    ]


def _statuses(operation: Operation, *, has_path_parameters: bool, with_keys: bool) -> list[int]:
    """The statuses of the errors that the operation may answer with."""
    has_body = operation.body is not None
    possible = {
        400: True,  # also for what is not HTTP
        401: with_keys and operation.needs_key,
        404: has_body or has_path_parameters,
        408: operation.generates,
        413: True,  # any request may have a body
        429: operation.generates,
        431: True,
        500: True,
        503: 503 not in operation.other_statuses,
    }
    return [status for status, is_possible in possible.items() if is_possible]


def _answers(operation: Operation) -> dict[str, Any]:
    """The answers of handlers: a whole one, or a stream."""
    schema = {"type": "object" if operation.content_type == JSON else "string"}
    content: dict[str, Any] = {operation.content_type: {"schema": schema}}
    if operation.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    described = "The answer." if not operation.streams else "The answer, or with `stream` true its events."
    answers = {"200": {"description": described, "content": content}}
    for status in operation.other_statuses:
        answers[str(status)] = {"description": _STATUSES[status], "content": content}
    return answers


def _error_response(dialect: str, status: int) -> dict[str, Any]:
    content = {JSON: {"schema": {"$ref": f"#/components/schemas/{dialect}Error"}}}
    plain = {"text/plain": {"schema": {"type": "string"}}}
    response: dict[str, Any] = {"description": _STATUSES[status]}
    response["content"] = plain if status == 431 else content | plain if status == 400 else content
    if status in (429, 503):
        schema = {"type": "integer", "minimum": 1}
        response["headers"] = {"Retry-After": {"schema": schema, "description": "Seconds."}}
    if status == 401:
        response["headers"] = {"WWW-Authenticate": {"schema": {"type": "string"}}}
    if status == 405:
        response["headers"] = {"Allow": {"schema": {"type": "string"}}}
    return response


def _error_schema(dialect: Dialect) -> dict[str, Any]:
    """The schema of the bodies that the dialect makes, found from one of them."""
    body = dialect.error_body(HttpError(400, "message"))
    fields = {
        name: {"type": "string"} if value else {"type": ["string", "null"]} for name, value in body["error"].items()
    }
    error = {"type": "object", "properties": fields, "required": [*fields]}
    properties = {name: error if name == "error" else {"const": value} for name, value in body.items()}
    return {"type": "object", "properties": properties, "required": [*properties]}
