"""Each field that the official clients can send is known: it has an effect, has none and is accepted, or is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from anthropic.resources.beta.messages import Messages as BetaMessages
from anthropic.resources.messages import Messages
from openai.resources.chat.completions import Completions as ChatCompletions
from openai.resources.completions import Completions
from openai.resources.responses import InputTokens, Responses

from tests.unit.pipeline.http.application import app_of, ask
from tests.unit.pipeline.http.fake_engine import FakeEngine

OF_CLIENT = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}  # arguments that are no fields
CALLS: list[tuple[str, Callable[..., Any]]] = [
    ("/v1/completions", Completions.create),
    ("/v1/chat/completions", ChatCompletions.create),
    ("/v1/responses", Responses.create),
    ("/v1/responses/input_tokens", InputTokens.count),
    ("/v1/messages", Messages.create),
    ("/v1/messages", BetaMessages.create),
    ("/v1/messages/count_tokens", Messages.count_tokens),
]
IN_HEADERS = {"betas", "workspace_id"}


@pytest.mark.parametrize(("path", "method"), CALLS, ids=[f"{path} {i}" for i, (path, _) in enumerate(CALLS)])
def test_no_field_is_unknown(path: str, method: Callable[..., Any]) -> None:
    app = app_of(FakeEngine())
    fields = set(inspect.signature(method).parameters) - OF_CLIENT - IN_HEADERS
    assert len(fields) > 5
    unknown = []
    for name in sorted(fields):
        answer = ask(app, path, {name: {"no": "such value"}})
        if "is no field" in answer.text:
            unknown.append(name)
    assert unknown == []
