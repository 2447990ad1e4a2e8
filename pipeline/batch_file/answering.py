"""Answers the requests of a batch with the HTTP server's handlers, over an engine's client and without a socket."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Final

import msgspec
from starlette.datastructures import Headers

from ipc.errors import EngineUnavailable, InvalidRequest, QueueFull
from pipeline.batch_file.lines import Answer, RequestLine
from pipeline.client.async_client import AsyncClient
from pipeline.http.anthropic import messages
from pipeline.http.config import COUNTERS, HttpConfig
from pipeline.http.errors import ANTHROPIC, OPENAI, Dialect, HttpError, http_error
from pipeline.http.make_service import make_service
from pipeline.http.openai import chat_completions, completions
from pipeline.http.openai.responses import create as responses
from pipeline.http.service import Service, new_id
from pipeline.http.transport import Call, Handler, Reply

HANDLERS: Final[dict[str, tuple[Handler, Dialect]]] = {
    "/v1/chat/completions": (chat_completions.create, OPENAI),
    "/v1/completions": (completions.create, OPENAI),
    "/v1/responses": (responses.create, OPENAI),
    "/v1/messages": (messages.create, ANTHROPIC),
}
_FIRST_PAUSE_S: Final = 0.1  # after a full queue without a hint; longer after each further refusal
_LONGEST_PAUSE_S: Final = 5.0
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
    return make_service(
        client, HttpConfig(), stats, model_name=health.model, model_folder=health.model_folder,
        chat_template=health.chat_template, max_model_len=health.max_model_len,
    )  # fmt: skip


class Answering:
    """Answers requests one by one. A full queue delays a request; it is no answer."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def answer(self, request: RequestLine) -> Answer:
        """The answer of a request, with the status of its error if it failed.

        Raises EngineUnavailable if the engine is gone: the request is then neither done nor failed.
        """
        request_id = new_id("req_")
        handler, dialect = HANDLERS.get(request.url, (None, OPENAI))
        try:
            if request.method.upper() != "POST" or handler is None:
                raise HttpError(
                    400, f"{request.method} {request.url[:100]} cannot be asked in a file: use POST with one of "
                    f"{', '.join(HANDLERS)}",
                )  # fmt: skip
            value, status = await self._ask(handler, request, request_id), 200
        except EngineUnavailable:
            raise
        except Exception as error:
            known = http_error(error)
            if known is None:
                raise
            value, status = dialect.error_body(known), known.status
        body = value if isinstance(value, bytes) else msgspec.json.encode(value)
        return Answer(status_code=status, request_id=request_id, body=msgspec.Raw(body))

    async def _ask(self, handler: Handler, request: RequestLine, request_id: str) -> object:
        call = Call(
            service=self._service, method="POST", path_params={}, headers=_JSON, body=bytes(request.body),
            request_id=request_id, scope={"path": request.url},
        )  # fmt: skip
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                reply = await handler(call)
            except QueueFull as error:
                await asyncio.sleep((error.retry_after_s or pause_s) * random.uniform(1.0, 1.5))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                continue
            if not isinstance(reply, Reply):
                raise HttpError(400, "stream (true) has no meaning in a file: leave it out", param="stream")
            return reply.value


async def answer_all(answering: Answering, requests: Iterable[RequestLine], concurrency: int, settle: Settle) -> None:
    """Answer requests, at most `concurrency` at a time, and give each answer to `settle` as it comes.

    Reads no further ahead than that, so the memory does not grow with the file. Raises what `answer` raises; requests
    that are open then have no answer.
    """
    left = iter(requests)

    async def work() -> None:
        for request in left:
            settle(request, await answering.answer(request))

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
