"""The ASGI application: the table of routes, and what happens to every request before its endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pipeline.http import openapi
from pipeline.http.anthropic import messages
from pipeline.http.anthropic.body import MessagesBody, PromptBody
from pipeline.http.engine_api import live, status, tokenizing
from pipeline.http.errors import ANTHROPIC, OPENAI, Dialect, HttpError
from pipeline.http.metrics import endpoint
from pipeline.http.openai import chat_completions, completions, models
from pipeline.http.openai.chat_completions import ChatCompletionBody
from pipeline.http.openai.completion_body import CompletionBody
from pipeline.http.openai.responses import create as responses
from pipeline.http.openai.responses import input_tokens, stored
from pipeline.http.openai.responses.body import ResponseBody
from pipeline.http.operation import Operation
from pipeline.http.page import static
from pipeline.http.service import Service, new_id
from pipeline.http.transport import JSON, SERVER_ENDS, Endpoint, Handler, Receive, Scope, Send

logger = logging.getLogger(__name__)

_STOPS: Final = HttpError(503, SERVER_ENDS, code="unavailable", retry_after_s=1.0)
REQUEST_ID: Final = b"x-request-id"
_MAX_REQUEST_ID_BYTES: Final = 256
_GUARDED: Final = ("/v1/", "/tokenize", "/detokenize")


def _route(method: str, path: str, handler: Handler, dialect: Dialect = OPENAI, **operation: Any) -> Route:
    """`operation`: the fields of Operation, for the route's OpenAPI description."""
    described = Operation(needs_key=f"{path}/".startswith(_GUARDED), **operation)
    return Route(path, Endpoint(handler, dialect, described), methods=[method])


ROUTES: Final = [
    _route("GET", "/", static.page, content_type="text/html"),
    _route("GET", "/live", live.live, query=live.QUERY),
    _route("GET", "/v1/models", models.list_models),
    _route("GET", "/v1/models/{model:path}", models.retrieve_model),
    _route("POST", "/v1/completions", completions.create, body=CompletionBody, generates=True),
    _route("POST", "/v1/chat/completions", chat_completions.create, body=ChatCompletionBody, generates=True),
    _route("POST", "/v1/messages", messages.create, ANTHROPIC, body=MessagesBody, generates=True),
    _route("POST", "/v1/messages/count_tokens", messages.count_tokens, ANTHROPIC, body=PromptBody),
    _route("POST", "/tokenize", tokenizing.tokenize, body=tokenizing.TokenizeBody),
    _route("POST", "/detokenize", tokenizing.detokenize, body=tokenizing.DetokenizeBody),
    _route("POST", "/v1/responses", responses.create, body=ResponseBody, generates=True),
    _route("POST", "/v1/responses/input_tokens", input_tokens.count, body=ResponseBody),
    _route("GET", "/v1/responses/{response_id}", stored.retrieve, query=stored.RETRIEVE_QUERY),
    _route("DELETE", "/v1/responses/{response_id}", stored.delete),
    _route("GET", "/v1/responses/{response_id}/input_items", stored.list_input_items, query=stored.LIST_QUERY),
    _route("POST", "/v1/responses/{response_id}/cancel", stored.cancel),
    _route("GET", "/health", status.health, other_statuses=(503,)),
    _route("GET", "/ready", status.ready, other_statuses=(503,)),
    _route("GET", "/version", status.version),
    _route("GET", "/metrics", endpoint.metrics, content_type="text/plain"),
    _route("GET", "/openapi.json", openapi.document),
]


def make_app(service: Service, keys: Sequence[str]) -> Starlette:
    """The application of one process. `keys`: the keys that requests may carry; none = no key is needed."""
    middleware = [Middleware(Bookkeeping)]
    if service.config.cors_origins:
        middleware.append(
            Middleware(
                CORSMiddleware, allow_origins=service.config.cors_origins, allow_methods=["*"], allow_headers=["*"],
                expose_headers=["x-request-id", "request-id", "retry-after"], max_age=600,
            )
        )  # fmt: skip
    if keys:
        middleware.append(Middleware(KeyGuard, keys=keys))
    app = Application(routes=ROUTES, middleware=middleware, exception_handlers=HANDLERS)
    app.state.service = service
    return app


class Application(Starlette):
    """Keeps the server's own `send` for the events of streams: each wrapper around it costs time for each token."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["send"] = send
        await super().__call__(scope, receive, send)


class Bookkeeping:
    """Gives each request its id, returns the id in the answer's header, and counts answers by status."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if 0 < len(given) <= _MAX_REQUEST_ID_BYTES and given.isprintable() else new_id("req_")
        scope["request_id"] = request_id
        value = request_id.encode("latin-1", "replace")
        added = [(REQUEST_ID, value)]
        if is_anthropic(scope["path"]):
            added.append((b"request-id", value))

        async def send_with_id(message: Any) -> None:
            if message["type"] == "http.response.start":
                scope["status"] = message["status"]
                message["headers"] = [*message["headers"], *added]
            await send(message)

        service: Service = scope["app"].state.service
        traced: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if service.tracer is not None and scope["path"].startswith("/v1/"):
            traced = service.tracer.request(scope["method"], scope["path"], Headers(scope=scope), scope)
        try:
            with traced:
                await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:  # the server ends, and its last second is over
            task = asyncio.current_task()
            if "status" in scope or task is None:
                raise
            task.uncancel()
            await _error_response(scope["path"], _STOPS)(scope, receive, send_with_id)
        finally:
            _count(service.stats, scope.get("status", 499))


def _count(stats: Any, status: int) -> None:
    name = str(status) if status in (429, 499, 503) else f"{status // 100}xx"
    getattr(stats, f"num_responses_{'2xx' if name == '3xx' else name}")[0] += 1


class KeyGuard:
    """Refuses guarded paths without a key. Keys are compared by their hashes, so the time tells nothing about them."""

    def __init__(self, app: Any, keys: Iterable[str]) -> None:
        self._app = app
        self._hashes = {_hash(key) for key in keys}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if f"{scope['path']}/".startswith(_GUARDED) and scope["method"] != "OPTIONS":
            headers = Headers(scope=scope)
            scheme, _, token = headers.get("authorization", "").partition(" ")
            given = [token.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key", "")]
            if self._hashes.isdisjoint(map(_hash, given)):
                scope["app"].state.service.stats.num_unauthorized[0] += 1
                error = HttpError(401, _KEY_WRONG if any(given) else _KEY_MISSING, code="invalid_api_key")
                response = _error_response(scope["path"], error)
                response.headers["www-authenticate"] = _CHALLENGE
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


_CHALLENGE: Final = 'Bearer realm="ringfeed"'  # RFC 9110 requires one with every 401
_KEY_MISSING: Final = "this server needs a key: send the header Authorization: Bearer KEY"
_KEY_WRONG: Final = "the key is not one of this server's keys (http.api_key_file)"


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """The router found no endpoint, or none for this method."""
    assert isinstance(error, HTTPException), "the handler is registered for this class"
    path, method = request.url.path, request.method
    messages = {
        404: f"there is no endpoint {path[:200]}: /openapi.json lists them",
        405: f"{path[:200]} does not take {method}: /openapi.json lists the methods",
    }
    message = messages.get(error.status_code, error.detail)
    response = _error_response(path, HttpError(error.status_code, message))
    response.headers.update(error.headers or {})
    return response


async def _on_exception(request: Request, error: Exception) -> Response:
    """The middleware failed. Endpoints answer and log their own errors."""
    request_id = request.scope.get("request_id", "-")
    logger.error("request %s to %s failed", request_id, request.url.path[:200], exc_info=error)
    message = f"internal error; the log has it under request id {request_id}"
    return _error_response(request.url.path, HttpError(500, message))


HANDLERS: Final[Any] = {HTTPException: _on_http_exception, Exception: _on_exception}


def is_anthropic(path: str) -> bool:
    """Whether the path belongs to Anthropic's API."""
    return f"{path}/".startswith("/v1/messages/")


def _error_response(path: str, error: HttpError) -> Response:
    dialect = ANTHROPIC if is_anthropic(path) else OPENAI
    return Response(msgspec.json.encode(dialect.error_body(error)), error.status, error.headers, JSON)
