"""The same request gives the same answer by every way into the engine: the SDK, and each API of the HTTP server."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest

from pipeline import Chat, Pipeline, SamplingParams

pytestmark = pytest.mark.slow

MESSAGES = [
    {"role": "system", "content": "Answer in one line."},
    {"role": "user", "content": "Write some words: 你好 😀 and a number."},
]
MAX_TOKENS = 24
SAMPLINGS: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 1.5, "top_p": 0.9, "seed": 11}]


def events_of(answer: httpx2.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


def post(engine: Pipeline, path: str, body: dict[str, Any]) -> httpx2.Response:
    return httpx2.post(f"{engine.http_url}{path}", json=body, timeout=60)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "seeded"])
def test_every_api_gives_the_answer_of_the_sdk(engine: Pipeline, sampling: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True, **sampling)
    [expected] = engine.client.generate(Chat(MESSAGES), params).completions
    prompt_ids = engine.client.tokenize(Chat(MESSAGES)).token_ids
    common = {**sampling, "ignore_eos": True}
    texts: dict[str, str] = {}
    ids: dict[str, list[int]] = {}

    chat = {**common, "messages": MESSAGES, "max_tokens": MAX_TOKENS, "return_token_ids": True}
    whole = post(engine, "/v1/chat/completions", chat).json()["choices"][0]
    texts["chat"], ids["chat"] = whole["message"]["content"], whole["token_ids"]
    chunks = [each["choices"][0] for each in events_of(post(engine, "/v1/chat/completions", chat | {"stream": True}))]
    texts["chat stream"] = "".join(each["delta"].get("content") or "" for each in chunks)
    ids["chat stream"] = [token_id for each in chunks for token_id in each.get("token_ids") or []]

    completion = {**common, "prompt": prompt_ids, "max_tokens": MAX_TOKENS, "return_token_ids": True}
    whole = post(engine, "/v1/completions", completion).json()["choices"][0]
    texts["completion"], ids["completion"] = whole["text"], whole["token_ids"]
    chunks = [each["choices"][0] for each in events_of(post(engine, "/v1/completions", completion | {"stream": True}))]
    texts["completion stream"] = "".join(each["text"] for each in chunks)
    ids["completion stream"] = [token_id for each in chunks for token_id in each.get("token_ids") or []]

    response = {**common, "input": MESSAGES, "max_output_tokens": MAX_TOKENS}
    output = post(engine, "/v1/responses", response).json()["output"]
    texts["response"] = output[-1]["content"][0]["text"]
    events = events_of(post(engine, "/v1/responses", response | {"stream": True}))
    texts["response stream"] = "".join(each["delta"] for each in events if each["type"] == "response.output_text.delta")
    assert ids == dict.fromkeys(ids, expected.token_ids)
    assert texts == dict.fromkeys(texts, expected.text)


def test_a_message_of_anthropics_api_is_the_answer_of_the_sdk(engine: Pipeline) -> None:
    """This API has no seed, and its system message is a field."""
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0)
    [expected] = engine.client.generate(Chat(MESSAGES), params).completions
    system, user = MESSAGES
    body = {
        "model": engine.client.health().model, "max_tokens": MAX_TOKENS, "temperature": 0, "system": system["content"],
        "messages": [user],
    }  # fmt: skip
    whole = post(engine, "/v1/messages", body).json()
    assert "".join(block["text"] for block in whole["content"]) == expected.text
    events = events_of(post(engine, "/v1/messages", body | {"stream": True}))
    deltas = [each["delta"]["text"] for each in events if each["type"] == "content_block_delta"]
    assert "".join(deltas) == expected.text
