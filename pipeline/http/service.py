"""What every endpoint of one server process uses: the engine's client, the model's names, limits and counters."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pipeline.client.async_client import AsyncClient
from pipeline.http.config import HttpConfig
from pipeline.http.errors import HttpError
from pipeline.http.generation.defaults import SamplingDefaults
from pipeline.http.generation.reasoning_start import ReasoningStart
from pipeline.http.live_reading import MAX_AGE_S, LiveReading, read_engine
from pipeline.http.parsing.formats import OutputFormat
from pipeline.http.shared_answer import SharedAnswer
from pipeline.http.tracing import RequestTracer


@dataclass(kw_only=True)
class Service:
    """One object for each process. Its parts are set once, at start.

    Args:
        client: of the engine.
        config: of the server.
        model_names: names under which requests may ask for the model, at least one; answers carry the first.
        model_folder: of the model's files.
        max_model_len: most tokens, prompt and output together, of one sequence.
        format: how the model writes calls of tools and reasoning.
        reasoning_start: tells whether a prompt ends inside the reasoning.
        template_reads_tools: the model's chat template can show tools.
        defaults: values of sampling parameters that a request leaves out.
        takes_priority: the engine's policy schedules requests by their priority.
        tracer: sends traces of requests; None = they are not traced.
        stats: counters of this process (`config.COUNTERS`), each an array [1] int64.
    """

    client: AsyncClient
    config: HttpConfig
    model_names: tuple[str, ...]
    model_folder: str
    max_model_len: int
    format: OutputFormat
    reasoning_start: ReasoningStart
    template_reads_tools: bool
    defaults: SamplingDefaults
    stats: Any
    takes_priority: bool = True
    tracer: RequestTracer | None = None
    started_at: int = field(default_factory=lambda: int(time.time()))
    num_arriving_bytes: int = 0  # of bodies that are not complete
    large_bodies: asyncio.Lock = field(default_factory=asyncio.Lock)  # complete ones are decoded one after the other
    _num_open: int = 0
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    @cached_property
    def live(self) -> SharedAnswer[LiveReading]:
        """The engine's present figures, for the page."""
        return SharedAnswer(lambda: read_engine(self.client), MAX_AGE_S)

    def check_model(self, name: str | None) -> str:
        """The model's name for the answer. Raises HttpError 404 for a model that this engine does not serve."""
        if name is None or name == "" or name in self.model_names:
            return name or self.model_names[0]
        raise HttpError(
            404,
            f"model ({name[:200]!r}) is not served here: use {' or '.join(map(repr, self.model_names))}",
            param="model",
            code="model_not_found",
        )

    @contextlib.contextmanager
    def open_request(self) -> Iterator[None]:
        """Count a request of the engine as open."""
        self._num_open += 1
        self.stats.num_open_requests[0] = self._num_open
        try:
            yield
        finally:
            self._num_open -= 1
            self.stats.num_open_requests[0] = self._num_open
            if not self._num_open:
                self._idle.set()

    @contextlib.contextmanager
    def open_stream(self) -> Iterator[None]:
        """Count a stream as open."""
        self.stats.num_open_streams[0] += 1
        try:
            yield
        finally:
            self.stats.num_open_streams[0] -= 1

    async def wait_idle(self) -> None:
        """Wait until no request is open."""
        while self._num_open:
            self._idle.clear()
            await self._idle.wait()

    def note_disconnect(self, scope: Any) -> None:
        """A client has left before its answer was complete."""
        self.stats.num_disconnects[0] += 1
        scope["status"] = 499


def new_id(prefix: str) -> str:
    """An id for an object of the API, such as "chatcmpl-4f...". It cannot be guessed."""
    return f"{prefix}{uuid.uuid4().hex}"
