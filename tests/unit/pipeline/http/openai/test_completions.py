"""`/v1/completions`: what an answer repeats of its prompt."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from ipc.sampling_params import SamplingParams
from pipeline import Output
from pipeline.client.outputs import TokenLogprob, Usage
from tests.unit.pipeline.http.application import app_of, ask
from tests.unit.pipeline.http.fake_engine import FakeEngine


def row(token_id: int) -> TokenLogprob:
    return TokenLogprob(token_id=token_id, logprob=-1.0, top={}, token_bytes={token_id: bytes([97 + token_id])})


class ScoringEngine(FakeEngine):
    """Scores a prompt of four tokens in two steps, as an engine does with a long prompt, and generates two tokens."""

    async def _samples(self, prompt: Any, params: SamplingParams) -> AsyncIterator[Output]:
        yield Output(request_id="r", text="", token_ids=[], prompt_logprobs=[None, row(1)])
        yield Output(request_id="r", text="", token_ids=[], prompt_logprobs=[row(2), row(3)])
        yield Output(request_id="r", text="e", token_ids=[4], logprobs=[row(4)])
        yield Output(
            request_id="r", text="f", token_ids=[5], logprobs=[row(5)], finished=True, finish_reason="length",
            usage=Usage(4, 2, 0),
        )  # fmt: skip


def test_a_stream_repeats_all_scores_of_a_prompt_that_takes_several_steps() -> None:
    body = {"prompt": "abcd", "max_tokens": 2, "echo": True, "logprobs": 1, "stream": True}
    events = ask(app_of(ScoringEngine()), "/v1/completions", body).text.split("\n\n")
    choices = [msgspec.json.decode(event[6:])["choices"][0] for event in events if event.startswith("data: {")]
    assert "".join(choice["text"] for choice in choices) == "abcdef"
    values = [value for choice in choices for value in choice["logprobs"]["token_logprobs"]]
    assert values == [None, *[pytest.approx(-1.0)] * 5]
    assert [token for choice in choices for token in choice["logprobs"]["tokens"]] == list("abcdef")
