"""Answers for the schemas of a public suite, 64 at a time beside free requests, streamed and whole."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from typing import Any, Final, NamedTuple

import jsonschema
import pytest

from pipeline import AsyncClient, Pipeline, SamplingParams, StructuredOutputs
from tests.integration.conftest import TINY_CONFIG
from tests.reference.json_schemas import schema_groups
from tests.unit.workers.grammar.grammar_tools import matchers_of
from workers.model_tokenizer.loading import load_tokenizer

pytestmark = pytest.mark.slow

OVERRIDES: Final = [
    "scheduler.max_num_seqs=64", "scheduler.max_model_len=128", "cache.num_blocks=250", "grammar.mask_timeout_s=5",
]  # fmt: skip
MAX_TOKENS: Final = 40
NUM_AT_ONCE: Final = 64


class Answer(NamedTuple):
    text: str
    token_ids: list[int]
    finish_reason: str | None


async def ask(client: AsyncClient, prompt: str, params: SamplingParams, stream: bool) -> Answer:
    if not stream:
        output = await client.generate(prompt, params)
        return Answer(output.text, output.token_ids, output.finish_reason)
    pieces = [piece async for piece in client.generate(prompt, params, stream=True)]
    token_ids = [token_id for piece in pieces for token_id in piece.token_ids]
    return Answer("".join(piece.text for piece in pieces), token_ids, pieces[-1].finish_reason)


async def ask_all(endpoint: str, requests: list[tuple[str, SamplingParams]]) -> list[Answer]:
    """Every other one is streamed."""
    places = asyncio.Semaphore(NUM_AT_ONCE)

    async def one(client: AsyncClient, i: int) -> Answer:
        async with places:
            return await ask(client, *requests[i], stream=i % 4 >= 2)

    async with AsyncClient(endpoint) as client:
        return await asyncio.gather(*(one(client, i) for i in range(len(requests))))


def structured_requests(eos_token_id: int) -> list[tuple[str, SamplingParams]]:
    """Each schema greedy and sampled. In half of the requests the text ends as soon as it is complete."""
    requests = []
    for i, group in enumerate(schema_groups()):
        for temperature in (0.0, 1.0):
            bias = {eos_token_id: 100.0} if (i + int(temperature)) % 2 else None
            params = SamplingParams(
                max_tokens=MAX_TOKENS, temperature=temperature, seed=i, logit_bias=bias,
                structured_outputs=StructuredOutputs(json=group.schema),
            )  # fmt: skip
            requests.append(("A list is", params))
    return requests


def test_every_complete_answer_is_valid_and_every_other_one_begins_a_valid_one() -> None:
    with Pipeline(TINY_CONFIG, OVERRIDES) as pipeline:
        eos_token_id = load_tokenizer(str(TINY_CONFIG.parent / "tiny-model")).eos_token_id
        assert eos_token_id is not None
        structured = structured_requests(eos_token_id)
        free: list[tuple[str, SamplingParams]] = [
            ("The for statement", SamplingParams(max_tokens=20, temperature=float(seed % 2), seed=seed))
            for seed in range(20)
        ]
        alone = asyncio.run(ask_all(pipeline.endpoint, free))
        before = pipeline.client.stats()["scheduler"]["num_structured_unfinished"]
        mixed = [request for pair in zip(structured, itertools.cycle(free), strict=False) for request in pair]
        answers = asyncio.run(ask_all(pipeline.endpoint, mixed))
        num_cut_off = sum(answer.finish_reason == "length" for answer in answers[::2])
        deadline = time.monotonic() + 10.0  # an answer may be there a moment before it is counted
        while (after := pipeline.client.stats()["scheduler"]["num_structured_unfinished"]) < before + num_cut_off:
            assert time.monotonic() < deadline, f"{after - before} are counted, {num_cut_off} were cut off"
            time.sleep(0.02)
    for answer, expected in zip(answers[1::2], itertools.cycle(alone), strict=False):
        assert (answer.token_ids, answer.text) == (expected.token_ids, expected.text)
    ends: dict[bool, int] = {True: 0, False: 0}
    for (_, params), answer in zip(structured, answers[::2], strict=True):
        ends[is_complete(params.structured_outputs, answer)] += 1
    assert min(ends.values()) > 60, f"complete: {ends[True]}, cut off: {ends[False]}"
    assert after - before == ends[False]


def is_complete(spec: Any, answer: Answer) -> bool:
    """Whether an answer ended with "stop". It must be valid then, and else the beginning of a valid one."""
    assert answer.finish_reason in ("stop", "length")
    if answer.finish_reason == "stop":
        jsonschema.validate(json.loads(answer.text), json.loads(str(spec.json)))
        return True
    matchers = matchers_of(spec)
    for token_id in answer.token_ids:
        matchers.advance(1, token_id)
    assert matchers.problem(1) == ""
    return False
