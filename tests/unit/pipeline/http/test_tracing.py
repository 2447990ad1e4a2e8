"""Traces of requests, as a collector receives them."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from ipc.messages import RequestTimes
from pipeline.http.tracing import RequestTracer, note_sample, note_usage

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def collected(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The spans that a collector has received by now."""
    spans: list[Any] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            request = ExportTraceServiceRequest()
            request.ParseFromString(gzip.decompress(body) if self.headers["content-encoding"] == "gzip" else body)
            spans.extend(s for r in request.resource_spans for scope in r.scope_spans for s in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield spans
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_trace_has_each_stage_of_each_sample_below_the_clients_span(collected: list[Any]) -> None:
    tracer = RequestTracer.from_environment("m")
    assert tracer is not None
    now = time.monotonic_ns()
    headers = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01"}
    with tracer.request("POST", "/v1/completions", headers, {"status": 200}):
        note_sample(RequestTimes(now, now + 1_000, now + 3_000, now + 6_000, now + 10_000))
        note_sample(RequestTimes(now, now + 1_000))  # it ended in the queue
        note_usage(7, 5)
    tracer.close()
    root = next(span for span in collected if span.name == "POST /v1/completions")
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE_ID, SPAN_ID)
    values = {each.key: each.value for each in root.attributes}
    assert values["http.response.status_code"].int_value == 200
    assert values["gen_ai.usage.input_tokens"].int_value == 7
    stages = [(s.name, s.end_time_unix_nano - s.start_time_unix_nano) for s in collected if s is not root]
    assert stages == [
        ("tokenization", 1_000), ("queue", 2_000), ("prefill", 3_000), ("decode", 4_000), ("tokenization", 1_000),
    ]  # fmt: skip
    assert {span.parent_span_id for span in collected if span is not root} == {root.span_id}
    assert abs(root.end_time_unix_nano - time.time_ns()) < 60e9


def test_without_the_environments_word_nothing_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", raising=False)
    assert RequestTracer.from_environment("m") is None
    note_sample(RequestTimes(0))  # has no effect, and does not fail
    note_usage(1, 1)


def test_requests_at_the_same_time_do_not_share_their_notes(collected: list[Any]) -> None:
    tracer = RequestTracer.from_environment("m")
    assert tracer is not None
    with tracer.request("POST", "/a", {}, {"status": 503}):
        with tracer.request("POST", "/b", {}, {}):
            note_usage(1, 1)
        note_usage(2, 2)
    tracer.close()
    tokens = {
        span.name: next(each.value.int_value for each in span.attributes if each.key == "gen_ai.usage.input_tokens")
        for span in collected
    }
    assert tokens == {"POST /a": 2, "POST /b": 1}
    assert next(span for span in collected if span.name == "POST /a").status.code == 2, "a server error"
