"""`/v1/models`, read by the official clients."""

from __future__ import annotations

from functools import partial
from typing import Any

import anthropic
import openai
import pytest

from tests.unit.pipeline.http.application import app_of, use_client
from tests.unit.pipeline.http.fake_engine import FakeEngine


@pytest.mark.parametrize(
    ("make", "url"),
    [(openai.AsyncOpenAI, "http://test/v1"), (anthropic.AsyncAnthropic, "http://test")],
    ids=["openai", "anthropic"],
)
def test_both_clients_list_and_find_the_model(make: Any, url: str) -> None:
    async def ids(client: Any) -> list[str]:
        return [model.id async for model in client.models.list()]

    app, strict = app_of(FakeEngine()), partial(make, base_url=url, _strict_response_validation=True)
    assert use_client(app, strict, ids) == ["m"]
    assert use_client(app, strict, lambda client: client.models.retrieve("m")).id == "m"
    missing = openai.NotFoundError if make is openai.AsyncOpenAI else anthropic.NotFoundError
    with pytest.raises(missing, match="is not served here"):
        use_client(app, strict, lambda client: client.models.retrieve("other"))
