"""Structured outputs in a running engine: answers that fit their schemas, neighbours that notice nothing, and a grammar
process that hangs."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from ipc.errors import Interrupted
from ipc.structured_outputs import StructuredOutputs
from pipeline import Client, InvalidRequest, Pipeline, SamplingParams, TokensExcluded
from tests.integration.conftest import TINY_CONFIG
from tests.reference.json_schemas import schema_groups
from tests.unit.workers.grammar.grammar_tools import matchers_of

pytestmark = pytest.mark.slow

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer", "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
# An answer to this fills max_tokens. The samples of a request are queued together, so many of them outgrow the blocks.
ENDLESS = {"type": "array", "items": {"type": "integer"}, "minItems": 100}
NUM_ENDLESS = 16
# Blocks for two of the longest sequences, and for fewer than NUM_ENDLESS answers of 60 tokens.
OVERRIDES = ["grammar.num_workers=2", "scheduler.max_model_len=256", "cache.num_blocks=34", "grammar.mask_timeout_s=1"]


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with Pipeline(TINY_CONFIG, OVERRIDES) as pipeline:
        yield pipeline.client


def specs() -> list[StructuredOutputs]:
    schemas = [ENDLESS] + [PERSON] * 16 + [group.schema for group in schema_groups()[::5]]
    return [StructuredOutputs(json=schema, disable_any_whitespace=bool(i % 2)) for i, schema in enumerate(schemas)]


def free_params(seed: int) -> SamplingParams:
    return SamplingParams(max_tokens=30, temperature=float(seed % 2), seed=seed, n=1 + seed % 2)


def test_answers_fit_their_schemas_and_free_requests_beside_them_do_not_change(client: Client) -> None:
    prompts = [f"{name} is" for name in ("A module", "A list", "The yield statement", "An object")]
    free = [(prompts[seed % 4], free_params(seed)) for seed in range(24)]
    alone = client.generate_batch(*map(list, zip(*free, strict=True)))
    wanted = specs()
    structured = [
        (
            prompts[i % 4],
            SamplingParams(
                max_tokens=60, temperature=float(i % 2), seed=i, structured_outputs=spec, n=NUM_ENDLESS if i == 0 else 1
            ),
        )
        for i, spec in enumerate(wanted)
    ]
    mixed = [pair for pairs in zip(structured, [*free, *free, *free], strict=False) for pair in pairs]
    outputs = client.generate_batch(*map(list, zip(*mixed, strict=True)))
    free_outputs = outputs[1::2]
    for i, output in enumerate(free_outputs):
        expected = alone[i % len(alone)]
        assert [each.token_ids for each in output.completions] == [each.token_ids for each in expected.completions]
    is_unfinished = [
        check_answer(spec, completion)
        for spec, output in zip(wanted, outputs[::2], strict=False)
        for completion in output.completions
    ]
    num_unfinished = sum(is_unfinished)
    assert all(is_unfinished[:NUM_ENDLESS])
    assert not all(is_unfinished[NUM_ENDLESS:]), "no answer was finished"
    deadline = time.monotonic() + 10.0  # an answer may be there a moment before it is counted
    while (scheduler := client.stats()["scheduler"])["num_structured_unfinished"] < num_unfinished:
        assert time.monotonic() < deadline, "some answers that were cut off are not counted"
        time.sleep(0.02)
    assert scheduler["num_structured_unfinished"] == num_unfinished
    assert scheduler["num_preemptions"] > 0
    stats = client.stats()
    assert all(stats[f"grammar.{i}"]["num_masks"] > 0 for i in range(2))
    assert sum(stats[f"grammar.{i}"]["num_matchers"] for i in range(2)) == 0


def check_answer(spec: StructuredOutputs, output: Any) -> bool:
    """Whether an answer ended early. A complete one is valid; the beginning of another one fits the grammar."""
    assert output.finish_reason in ("stop", "length")
    if output.finish_reason == "stop":
        schema = json.loads(str(spec.json))
        jsonschema.validate(json.loads(output.text), schema)
        return False
    matchers = matchers_of(spec)
    for token_id in output.token_ids:
        matchers.advance(1, token_id)
    assert matchers.problem(1) == ""
    return True


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"regex": "[a-f]{3}-[0-9]{2}"}, "[a-f]{3}-[0-9]{2}"),
        ({"grammar": 'start: "x" "y" ~ 1..3 "z"'}, "xy{1,3}z"),
        (
            {
                "structural_tag": json.dumps(
                    {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": {"const": [1]}}}
                )
            },
            r"\[1\]",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_every_kind_of_constraint_is_kept_streamed_and_whole_by_every_sample(
    client: Client, fields: dict[str, Any], pattern: str
) -> None:
    spec = StructuredOutputs(**fields, disable_any_whitespace="structural_tag" in fields)
    params = SamplingParams(max_tokens=24, temperature=1.0, seed=3, n=3, structured_outputs=spec)
    whole = client.generate("Answer:", params)
    for completion in whole.completions:
        assert re.fullmatch(pattern, completion.text)
        assert completion.finish_reason == "stop"
    streamed = ["", "", ""]
    for output in client.generate("Answer:", params, stream=True):
        streamed[output.index] += output.text
    assert streamed == [completion.text for completion in whole.completions]


def test_a_bad_schema_ends_its_own_request_with_the_reason(client: Client) -> None:
    with pytest.raises(InvalidRequest, match=r"structured_outputs\.json cannot be used"):
        client.generate("x", SamplingParams(structured_outputs=StructuredOutputs(json={"type": 7})))


def test_parameters_that_clash_with_a_grammar_are_named_and_no_mask_is_blamed(client: Client) -> None:
    params = SamplingParams(min_tokens=20, structured_outputs=StructuredOutputs(choice=["yes", "no"]))
    with pytest.raises(TokensExcluded, match=r"min_tokens \(20\) exclude every token that its grammar allows"):
        client.generate("x", params)


def test_a_grammar_process_that_hangs_interrupts_its_own_sequences_and_serves_again_afterwards() -> None:
    with (
        Pipeline(TINY_CONFIG, ["grammar.mask_timeout_s=0.2"]) as pipeline,
        Client(pipeline.endpoint, resume_timeout_s=0) as client,
    ):
        params = SamplingParams(structured_outputs=StructuredOutputs(regex="[a-z ]{4000}"))  # goes on for long
        expected = client.generate("A module is", SamplingParams(max_tokens=40)).token_ids
        stream = client.generate("A list:", params, stream=True)
        next(iter(stream))
        os.kill(pipeline.pids["grammar.0"], signal.SIGSTOP)
        try:
            with pytest.raises(Interrupted, match=r"grammar.mask_timeout_s \(0.2\)"):
                for _ in stream:
                    pass
            assert client.generate("A module is", SamplingParams(max_tokens=40)).token_ids == expected
        finally:
            os.kill(pipeline.pids["grammar.0"], signal.SIGCONT)
        answer = client.generate("Say:", SamplingParams(structured_outputs=StructuredOutputs(choice=["yes", "no"])))
        assert answer.text in ("yes", "no")
        assert answer.finish_reason == "stop"
        assert client.stats()["gpu"]["num_late_masks"] >= 1


def test_a_grammar_process_that_is_killed_interrupts_its_own_sequences_and_nothing_else() -> None:
    with (
        Pipeline(TINY_CONFIG, ["grammar.num_workers=2"]) as pipeline,
        Client(pipeline.endpoint, resume_timeout_s=0) as client,
    ):
        params = SamplingParams(structured_outputs=StructuredOutputs(regex="[a-z ]{4000}"))
        expected = client.generate("A module is", SamplingParams(max_tokens=40)).token_ids
        first, second = (client.generate("A list:", params, stream=True) for _ in range(2))
        token_ids = next(iter(first)).token_ids, next(iter(second)).token_ids
        assert all(token_ids)
        os.kill(pipeline.pids["grammar.0"], signal.SIGKILL)
        with pytest.raises(Interrupted):
            for _ in first:
                pass
        assert client.generate("A module is", SamplingParams(max_tokens=40)).token_ids == expected
        assert next(iter(second)).token_ids, "the other process's sequences go on"
        os.kill(pipeline.pids["grammar.1"], signal.SIGKILL)
        with pytest.raises(Interrupted):
            for _ in second:
                pass
        assert client.generate("A module is", SamplingParams(max_tokens=40)).token_ids == expected
        for _ in range(3):  # by processes that have taken the places of the dead
            answer = pipeline.client.generate(
                "Say:", SamplingParams(structured_outputs=StructuredOutputs(choice=["yes", "no"]))
            )
            assert answer.text in ("yes", "no")
