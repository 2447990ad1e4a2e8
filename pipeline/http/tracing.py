"""Traces of requests for OpenTelemetry: one span for the HTTP request, and below it one for each stage in the engine.

    POST /v1/chat/completions
        queue at the gateway, and tokenization    arrived     -> tokenized
        queue at the scheduler                    tokenized   -> admitted
        prefill                                   admitted    -> first token
        decode                                    first token -> last token

The engine's processes know nothing of traces: the stages come with a sample's final output (`RequestTimes`). On when
the environment variable OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT is set; the other OTEL_*
variables have their usual meaning. A client's `traceparent` header (W3C trace context) is the parent.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final

from ipc.messages import RequestTimes

logger = logging.getLogger(__name__)

_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_STAGES: Final = (  # name, and the times at which it begins and ends
    ("tokenization", "arrived_ns", "tokenized_ns"),
    ("queue", "tokenized_ns", "admitted_ns"),
    ("prefill", "admitted_ns", "first_token_ns"),
    ("decode", "first_token_ns", "last_token_ns"),
)


@dataclass
class RequestNotes:
    """What is known about a request's way through the engine: a time for each sample, and its tokens."""

    samples: list[RequestTimes] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)


_notes: ContextVar[RequestNotes | None] = ContextVar("request notes", default=None)


def note_sample(times: RequestTimes | None) -> None:
    """A sample of the present request has ended. Without a tracer this does nothing."""
    notes = _notes.get()
    if notes is not None and times is not None:
        notes.samples.append(times)


def note_usage(num_prompt_tokens: int, num_completion_tokens: int) -> None:
    """The present request has ended."""
    notes = _notes.get()
    if notes is not None:
        notes.attributes["gen_ai.usage.input_tokens"] = num_prompt_tokens
        notes.attributes["gen_ai.usage.output_tokens"] = num_completion_tokens


class RequestTracer:
    """Sends a trace of each request to the collector that the environment names. `model`: an attribute of all."""

    def __init__(self, model: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        service = os.environ.get("OTEL_SERVICE_NAME", "ringfeed")
        self._provider = TracerProvider(resource=Resource.create({"service.name": service}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("ringfeed")
        self._propagator = TraceContextTextMapPropagator()
        self._model = model

    @staticmethod
    def from_environment(model: str) -> RequestTracer | None:
        """The tracer; None if the environment asks for none, or OpenTelemetry is not installed."""
        if not any(os.environ.get(name) for name in _ENDPOINTS):
            return None
        try:
            return RequestTracer(model)
        except ImportError as error:
            logger.warning("requests are not traced: %s; pip install 'ringfeed[tracing]'", error)
            return None

    @contextmanager
    def request(self, method: str, path: str, headers: Mapping[str, str], result: Mapping[str, Any]) -> Iterator[None]:
        """Trace what happens inside. `result` has the "status" of the answer afterwards."""
        notes = RequestNotes()
        token = _notes.set(notes)
        start_ns = time.time_ns()
        try:
            yield
        finally:
            _notes.reset(token)
            self._send(method, path, headers, result.get("status", 499), start_ns, notes)

    def close(self) -> None:
        """Send what has not been sent, for at most a second."""
        self._provider.force_flush(1_000)
        self._provider.shutdown()

    def _send(
        self, method: str, path: str, headers: Mapping[str, str], status: int, start_ns: int, notes: RequestNotes
    ) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        parent = self._propagator.extract({"traceparent": headers.get("traceparent", ""),
                                           "tracestate": headers.get("tracestate", "")})  # fmt: skip
        attributes = {
            "http.request.method": method, "url.path": path, "http.response.status_code": status,
            "gen_ai.request.model": self._model, **notes.attributes,
        }  # fmt: skip
        span = self._tracer.start_span(
            f"{method} {path}", parent, SpanKind.SERVER, attributes=attributes, start_time=start_ns
        )
        inside = set_span_in_context(span)
        to_wall_ns = time.time_ns() - time.monotonic_ns()
        for index, times in enumerate(notes.samples):
            for name, begin, end in _STAGES:
                begin_ns, end_ns = getattr(times, begin), getattr(times, end)
                if begin_ns is not None and end_ns is not None:
                    stage = self._tracer.start_span(
                        name, inside, attributes={"sample": index}, start_time=begin_ns + to_wall_ns
                    )
                    stage.end(end_ns + to_wall_ns)
        if status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end()
