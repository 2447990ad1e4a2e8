"""Answers the requests of a batch with the HTTP server's handlers, over an engine's client and without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Final

import msgspec
from starlette.datastructures import Headers

from ipc.errors import EngineUnavailable, InvalidRequest, QueueFull, RingfeedError
from pipeline.batch_file.lines import Answer, RequestLine
from pipeline.client.async_client import AsyncClient
from pipeline.client.batch import Batch
from pipeline.http.anthropic import messages
from pipeline.http.config import COUNTERS, HttpConfig
from pipeline.http.errors import ANTHROPIC, OPENAI, Dialect, HttpError
from pipeline.http.make_service import make_service
from pipeline.http.openai import chat_completions, completions
from pipeline.http.openai.responses import create as responses
from pipeline.http.service import Service, new_id
from pipeline.http.transport import Call, Handler, Reply, as_http_error

HANDLERS: Final[dict[str, tuple[Handler, Dialect]]] = {
    "/v1/chat/completions": (chat_completions.create, OPENAI),
    "/v1/completions": (completions.create, OPENAI),
    "/v1/responses": (responses.create, OPENAI),
    "/v1/messages": (messages.create, ANTHROPIC),
}
_JSON: Final = Headers({"content-type": "application/json"})

Settle = Callable[[RequestLine, Answer], None]


async def service_of(client: AsyncClient) -> Service:
    """A service for the engine of this client.

    Raises EngineUnavailable, and InvalidRequest if the model's files are not on this machine.
    """
    health = await client.health()
    if not Path(health.model_folder).is_dir():
        raise InvalidRequest(
            f"the engine's model lies in {health.model_folder!r}, which is no folder of this machine: run the batch on "
            "the engine's machine"
        )
    stats = SimpleNamespace(**{name: [0] for name in COUNTERS})
    config = HttpConfig(
        served_model_names=health.served_model_names, tool_parser=health.tool_parser,
        reasoning_parser=health.reasoning_parser,
    )  # fmt: skip
    return make_service(
        client, config, stats, model_name=health.model, model_folder=health.model_folder,
        chat_template=health.chat_template, max_model_len=health.max_model_len, policy=health.policy,
    )  # fmt: skip


class Answering:
    """Answers requests one by one."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def answer(self, request: RequestLine) -> Answer:
        """The answer of a request, with the status of its error if it failed. The log has errors that are our own.

        Raises QueueFull, and EngineUnavailable if the engine is gone: the request is then neither done nor failed.
        """
        call = Call(
            service=self._service, method="POST", path_params={}, headers=_JSON, body=bytes(request.body),
            request_id=new_id("req_"), scope={"path": request.url[:100]},
        )  # fmt: skip
        handler, dialect = HANDLERS.get(request.url, (None, OPENAI))
        status = 200
        try:
            if request.method.upper() != "POST" or handler is None:
                raise HttpError(
                    400, f"{request.method} {request.url[:100]} cannot be asked in a file: use POST with one of "
                    f"{', '.join(HANDLERS)}",
                )  # fmt: skip
            reply = await handler(call)
            if not isinstance(reply, Reply):
                raise HttpError(400, "stream (true) has no meaning in a file: leave it out", param="stream")
            body = _encoded(reply.value)
        except (EngineUnavailable, QueueFull):
            raise
        except Exception as error:
            failure = as_http_error(error, call)
            body, status = _encoded(dialect.error_body(failure)), failure.status
        return Answer(status_code=status, request_id=call.request_id, body=msgspec.Raw(body))


def _encoded(value: object) -> bytes:
    return value if isinstance(value, bytes) else msgspec.json.encode(value)


async def answer_all(answering: Answering, requests: Iterable[RequestLine], concurrency: int, settle: Settle) -> None:
    """Answer requests, at most `concurrency` at a time, and give each answer to `settle` as it comes.

    Reads no further ahead than that, so the memory does not grow with the file. Raises EngineUnavailable if the engine
    is gone; requests that are open then have no answer.
    """

    def settle_or_end(request: RequestLine, result: Answer | RingfeedError) -> None:
        if isinstance(result, RingfeedError):
            raise result
        settle(request, result)

    await Batch(answering.answer, requests, concurrency, pause=asyncio.sleep, settle=settle_or_end).run()
