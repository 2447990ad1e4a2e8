"""One HTTP process: its event loop, its server, and the launcher's messages.

It serves from the moment when it has loaded. Until the engine is ready, requests of the engine get status 503. A drain
waits until the last open request has its answer; meanwhile new ones get 503 too, because the engine refuses them.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
from typing import Final

import uvloop

from ipc.messages import Abort, Drain, Drained, EngineState, Ready, Start
from pipeline.client.async_client import AsyncClient
from pipeline.http.app import make_app
from pipeline.http.config import HTTP_LISTENER, HttpBootstrap
from pipeline.http.listener import read_keys
from pipeline.http.make_service import make_service
from pipeline.http.server import Server
from workers.process import StopWorker, WorkerProcess

logger = logging.getLogger(__name__)

_GC_THRESHOLD: Final = 50_000  # new containers before a collection: requests leave few cycles
_ENGINE_TIMEOUT_S: Final = 5.0  # for the gateway to be reachable


def run(process: WorkerProcess, bootstrap: HttpBootstrap) -> None:
    """Serve until Stop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(HttpWorker(process, bootstrap).serve())


class HttpWorker:
    """Connects the server, the engine's client and the launcher's control channel on one event loop."""

    def __init__(self, process: WorkerProcess, bootstrap: HttpBootstrap) -> None:
        self._process = process
        self._bootstrap = bootstrap
        self._drains: set[asyncio.Task[None]] = set()
        self._is_aborted = False

    async def serve(self) -> None:
        """Serve until the launcher says Stop."""
        bootstrap, process = self._bootstrap, self._process
        async with AsyncClient(bootstrap.endpoint, timeout_s=_ENGINE_TIMEOUT_S) as client:
            client.ask_whether_ended(lambda: self._is_aborted)
            self._service = make_service(
                client, bootstrap.http, process.stats, model_name=bootstrap.model_name,
                model_folder=bootstrap.model_folder, chat_template=bootstrap.chat_template,
                max_model_len=bootstrap.max_model_len, policy=bootstrap.policy,
            )  # fmt: skip
            app = make_app(self._service, read_keys(bootstrap.http))
            self._server = Server(app, bootstrap.http, process.stats)
            process.on_control(self._on_control)
            process.ready()
            gc.enable()  # asyncio has no idle moment that could be told from a busy one
            gc.set_threshold(_GC_THRESHOLD, 20, 100)
            asyncio.get_running_loop().add_reader(process.control_fd, self._look)
            self._look()
            listener = socket.socket(fileno=bootstrap.worker.kept[HTTP_LISTENER])
            await self._server.run_on(listener)
            if self._service.tracer is not None:
                self._service.tracer.close()

    def _look(self) -> None:
        try:
            self._process.wait(0)
        except StopWorker:
            self._server.should_exit = True

    def _on_control(self, message: Start | Drain | Abort | EngineState) -> None:
        if isinstance(message, Start):
            self._process.say(Ready(role=self._process.role))
        elif isinstance(message, Drain | Abort):
            # After Abort the gateway fails all open requests, so this soon ends too. If the gateway itself was lost,
            # the client fails them: it resumes none.
            self._is_aborted = isinstance(message, Abort)
            task = asyncio.ensure_future(self._drain())
            self._drains.add(task)
            task.add_done_callback(self._drains.discard)

    async def _drain(self) -> None:
        await self._service.wait_idle()
        self._process.say(Drained())
        self._look()  # the send may have used up the edge of the control channel's descriptor
