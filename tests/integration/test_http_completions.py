"""`/v1/completions` of a running engine, used through the official client: scores, token ids, and ends of requests."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from ipc.sampling_params import SamplingParams
from pipeline import Pipeline

pytestmark = pytest.mark.slow

PROMPT = "The for statement is used to iterate over the élements of a sequence"
GREEDY: Any = {"model": "tiny-model", "temperature": 0, "max_tokens": 6}


@pytest.fixture(scope="module")
def completions(engine: Pipeline) -> Iterator[Any]:
    assert engine.http_url is not None
    with openai.OpenAI(base_url=f"{engine.http_url}/v1", api_key="x", max_retries=0) as client:
        yield client.completions


def test_scores_are_those_of_the_engine_and_their_tokens_make_up_the_text(completions: Any, engine: Pipeline) -> None:
    """lm-eval's `local-completions` reads scores this way."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=1, logprobs=1)
    own = engine.client.generate(PROMPT, params)
    assert own.prompt_logprobs is not None
    assert own.logprobs is not None
    for max_tokens in (0, 1):
        (choice,) = completions.create(
            prompt=PROMPT, echo=True, logprobs=1, **{**GREEDY, "max_tokens": max_tokens}
        ).choices
        rows = [*own.prompt_logprobs[1:], *own.logprobs[:max_tokens]]
        found = choice.logprobs
        assert found.token_logprobs == [None, *[pytest.approx(row.logprob, abs=1e-4) for row in rows if row]]
        assert choice.text == PROMPT + own.text * max_tokens
        assert [next(iter(top)) for top in found.top_logprobs[1:]] == found.tokens[1:]
        whole_characters = [i for i, token in enumerate(found.tokens) if "\ufffd" not in token]
        assert len(whole_characters) > len(PROMPT) / 8
        for i in whole_characters:
            assert choice.text[found.text_offset[i] :].startswith(found.tokens[i])


def test_a_stream_of_samples_makes_up_the_whole_answer(completions: Any) -> None:
    body: Any = {
        **GREEDY, "prompt": [PROMPT, "A class"], "n": 2, "seed": 5, "temperature": 1, "echo": True, "logprobs": 2,
    }  # fmt: skip
    whole = completions.create(**body)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    texts, values = [""] * 4, [[] for _ in range(4)]  # type: list[str], list[list[float | None]]
    usage = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(completions.create(**body, stream=True, stream_options=usage))
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        texts[choice.index] += choice.text
        values[choice.index] += choice.logprobs.token_logprobs if choice.logprobs else []
    assert texts == [choice.text for choice in whole.choices]
    for found, choice in zip(values, whole.choices, strict=True):
        assert found == pytest.approx(choice.logprobs.token_logprobs, abs=1e-4)
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert chunks[-1].usage.completion_tokens == 4 * GREEDY["max_tokens"]


@pytest.mark.parametrize("kept", [None, 1, 2, 7, -1])
def test_the_prompts_token_ids_are_those_that_the_engine_gets(completions: Any, engine: Pipeline, kept: Any) -> None:
    body: Any = {**GREEDY, "prompt": PROMPT, "extra_body": {"truncate_prompt_tokens": kept}}
    plain = completions.create(**body)
    shown = completions.create(**{**body, "extra_body": {**body["extra_body"], "return_token_ids": True}})
    (choice,) = shown.choices
    assert len(choice.prompt_token_ids) == plain.usage.prompt_tokens == shown.usage.prompt_tokens
    assert choice.text == plain.choices[0].text
    assert len(choice.token_ids) == shown.usage.completion_tokens
    (again,) = completions.create(prompt=choice.prompt_token_ids, echo=True, **GREEDY).choices
    assert again.text.endswith(choice.text)
    if kept is None:
        assert choice.prompt_token_ids == list(engine.client.tokenize(PROMPT).token_ids)
        assert again.text == PROMPT + choice.text


def test_a_prompt_that_is_too_long_fails_the_request_and_the_others_are_cancelled(
    completions: Any, engine: Pipeline
) -> None:
    before = engine.client.stats()["scheduler"]["num_sampled_tokens"]
    body: Any = {"model": "tiny-model", "max_tokens": 1_000, "extra_body": {"ignore_eos": True}}
    prompts = ["a", "b", "word " * 9_000]
    with pytest.raises(openai.BadRequestError) as refused:
        completions.create(prompt=prompts, **body)
    with pytest.raises(openai.APIError) as ended:  # the other prompts may have begun: then the error is an event
        list(completions.create(prompt=prompts, stream=True, **body))
    assert refused.value.code == ended.value.code == "context_length_exceeded"
    deadline = time.monotonic() + 10
    while any(engine.client.stats()["scheduler"][name] for name in ("num_running", "num_waiting")):
        assert time.monotonic() < deadline, "the other prompts still run"
    assert engine.client.stats()["scheduler"]["num_sampled_tokens"] - before < 2 * 2 * 1_000


def test_a_body_steers_the_text(completions: Any) -> None:
    (free,) = completions.create(prompt=PROMPT, logprobs=0, **{**GREEDY, "max_tokens": 12}).choices
    stop = free.logprobs.tokens[5]
    (stopped,) = completions.create(prompt=PROMPT, stop=[stop], **{**GREEDY, "max_tokens": 12}).choices
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    assert stopped.text == free.text[: free.text.index(stop)]
    (chosen,) = completions.create(prompt=PROMPT, **GREEDY, extra_body={"guided_choice": ["yes", "no"]}).choices
    assert chosen.text in ("yes", "no")
    (biased,) = completions.create(
        prompt=PROMPT, logit_bias={"7": 100}, **GREEDY, extra_body={"return_token_ids": True}
    ).choices
    assert biased.token_ids == [7] * 6
