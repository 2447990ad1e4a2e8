"""`/v1/models`, read by the official clients."""

from __future__ import annotations

import asyncio
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from tests.unit.pipeline.http.fake_engine import FakeEngine, app_of


def ask(make: Any, url: str, use: Any) -> Any:
    async def run() -> Any:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app_of(FakeEngine()))) as http_client:
            client = make(
                base_url=url, api_key="k", http_client=http_client, max_retries=0, _strict_response_validation=True
            )
            return await use(client)

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("make", "url"),
    [(openai.AsyncOpenAI, "http://test/v1"), (anthropic.AsyncAnthropic, "http://test")],
    ids=["openai", "anthropic"],
)
def test_both_clients_list_and_find_the_model(make: Any, url: str) -> None:
    async def ids(client: Any) -> list[str]:
        return [model.id async for model in client.models.list()]

    assert ask(make, url, ids) == ["m"]
    assert ask(make, url, lambda client: client.models.retrieve("m")).id == "m"
    missing = openai.NotFoundError if make is openai.AsyncOpenAI else anthropic.NotFoundError
    with pytest.raises(missing, match="is not served here"):
        ask(make, url, lambda client: client.models.retrieve("other"))
