"""The Responses API in front of a fake engine."""

from __future__ import annotations

from typing import Any

import httpx2

from ipc.sampling_params import SamplingParams
from pipeline.http.parsing.formats import OutputFormat
from tests.unit.pipeline.http.application import app_of, events_of, request
from tests.unit.pipeline.http.fake_engine import FakeEngine


class ResponsesApi:
    """An application and its engine. Each request to the engine takes a script."""

    def __init__(self, format: OutputFormat | None = None) -> None:
        self.engine = FakeEngine(pieces=[AssertionError("the engine has no script")])
        self.app = app_of(self.engine, format)

    def ask(self, method: str, path: str, **options: Any) -> httpx2.Response:
        """Send one request, and wait for the whole answer."""
        return request(self.app, method, f"/v1/{path}", **options)

    def create(self, *texts: str, finish_reason: str = "stop", **body: Any) -> dict[str, Any]:
        """A response to which the engine answers with these texts."""
        self.engine.script(*texts, finish_reason=finish_reason)
        answer = self.ask("POST", "responses", json={"input": "Hi", **body})
        assert answer.status_code == 200, answer.text
        value: dict[str, Any] = answer.json()
        return value

    def refused(self, status: int = 400, **body: Any) -> dict[str, Any]:
        """The error of a request that the engine never gets."""
        num_requests = len(self.engine.chats)
        answer = self.ask("POST", "responses", json={"input": "Hi", **body})
        assert answer.status_code == status, answer.text
        assert len(self.engine.chats) == num_requests
        error: dict[str, Any] = answer.json()["error"]
        return error

    def stream(self, *pieces: str | Exception, finish_reason: str = "stop", **body: Any) -> list[dict[str, Any]]:
        """The events of a streamed response, which count from 0."""
        self.engine.script(*pieces, finish_reason=finish_reason)
        events = events_of(self.ask("POST", "responses", json={"input": "Hi", "stream": True, **body}))
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        return events

    @property
    def messages(self) -> list[Any]:
        """The messages of the engine's last request."""
        return list(self.engine.chats[-1].messages)

    @property
    def params(self) -> SamplingParams:
        """The parameters of the engine's last request."""
        return self.engine.params[-1]
