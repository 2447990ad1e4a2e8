"""Every parameter of a request against plain definitions in float32: alone and in a mixed batch, greedy and sampled,
with steps planned ahead or not, preempted, with cached prefixes and with several samples.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import pytest
from tokenizers import AddedToken, Tokenizer

from pipeline import Output, Pipeline, SamplingParams, StructuredOutputs
from tests.integration.test_token_equality import config
from tests.reference.plain_generation import PlainEngine, PlainOutput
from tests.reference.tiny_models import make_tiny_model
from tests.unit.workers.text.tools import byte_level_tokenizer

pytestmark = pytest.mark.slow

MAX_TOKENS: Final = 18
EOS: Final = "</s>"
# Blocks for one of the longest sequences. The samples of a request are queued together and outgrow these blocks, so one
# of them is preempted, however slowly further requests arrive.
LIMITS: Final = {"scheduler.max_model_len": 48, "cache.num_blocks": 13}


@dataclass
class Served:
    """A random model with a tokenizer, and its plain reference."""

    folder: Path
    tokenizer: Tokenizer

    @classmethod
    def make(cls, folder: Path) -> Served:
        tokenizer = byte_level_tokenizer()
        tokenizer.add_special_tokens([AddedToken("<think>"), AddedToken("</think>")])
        eos_token_id = tokenizer.token_to_id(EOS)
        make_tiny_model("llama", folder, 5, vocab_size=tokenizer.get_vocab_size(), eos_token_id=eos_token_id)
        tokenizer.save(str(folder / "tokenizer.json"))
        return cls(folder, tokenizer)

    @cached_property
    def reference(self) -> PlainEngine:
        return PlainEngine(self.folder, self.tokenizer, [self.id(EOS)], (self.id("<think>"), self.id("</think>")))

    def id(self, token: str) -> int:
        found = self.tokenizer.token_to_id(token)
        assert found is not None, token
        return int(found)

    def rows(self) -> dict[str, dict[str, Any]]:
        """A row for each parameter: what it is asked with. The values are strong enough to change most answers."""
        letters = [self.id(letter) for letter in "abcdefgh"]
        vocab_size = self.tokenizer.get_vocab_size()
        return {
            "plain": {},
            "top_k": {"top_k": 5},
            "top_k off": {"top_k": -1},
            "top_p": {"top_p": 0.5},
            "min_p": {"min_p": 0.3},
            "repetition_penalty": {"repetition_penalty": 3.0},
            "presence_penalty": {"presence_penalty": 2.0, "logit_bias": {letters[0]: 9.0, letters[1]: 8.5}},
            "frequency_penalty": {"frequency_penalty": 1.5, "logit_bias": {letters[0]: 20.0}},
            "logit_bias": {"logit_bias": {token: (token * 7 % 40) - 20.0 for token in range(2, 302)}},
            "min_tokens": {"min_tokens": 6, "logit_bias": {self.id(EOS): 100.0}},
            "min_tokens of stop tokens": {"min_tokens": 4, "stop_token_ids": letters[:3], "allowed_token_ids": letters},
            "allowed_token_ids": {"allowed_token_ids": letters},
            "bad_words": {"allowed_token_ids": letters, "bad_words": [a + b for a in "abcd" for b in "efgh"] + ["h"]},
            "thinking_token_budget": {"thinking_token_budget": 5},
            "no thinking": {"thinking_token_budget": 0},
            "truncate_prompt_tokens": {"truncate_prompt_tokens": 6},
            "ignore_eos": {"ignore_eos": True, "logit_bias": {self.id(EOS): 100.0}},
            "stop_token_ids": {"stop_token_ids": letters, "logit_bias": dict.fromkeys(letters, 15.0)},
            "choice": {"structured_outputs": StructuredOutputs(choice=["a fox", "a foxes", "the dog"])},
            "everything": {
                "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": -0.4, "min_tokens": 3,
                "logit_bias": {letters[2]: 3.0}, "allowed_token_ids": list(range(vocab_size // 2)), "top_k": 50,
                "top_p": 0.95, "min_p": 0.01, "bad_words": ["ab"], "thinking_token_budget": 9,
            },
        }  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served.make(tmp_path_factory.mktemp("parameters"))


@pytest.fixture(scope="module", params=[1, 3], ids=lambda depth: f"depth {depth}")
def engine(request: pytest.FixtureRequest, served: Served) -> Iterator[Pipeline]:
    """Small enough that requests queue, are computed in chunks, and are preempted."""
    with Pipeline(config(served.folder, **LIMITS, **{"ring.depth": request.param})) as pipeline:
        yield pipeline


def asked(served: Served) -> list[tuple[str, list[int], SamplingParams]]:
    """Every row greedy and sampled, on one of three prompts that share their beginning."""
    draw = random.Random(3)
    vocab_size = served.tokenizer.get_vocab_size()
    beginning = [draw.randrange(5, vocab_size - 5) for _ in range(17)]
    prompts = [beginning + [draw.randrange(5, vocab_size - 5) for _ in range(count)] for count in (1, 4, 9)]
    requests = []
    for i, (name, values) in enumerate(served.rows().items()):
        for sampled in ({}, {"temperature": 0.9, "seed": 100 + i}):
            prompt = [*prompts[i % 3], *([served.id("<think>")] if "think" in name else [])]
            requests.append((name, prompt, SamplingParams(max_tokens=MAX_TOKENS, **{**values, **sampled})))
    return requests


def assert_equal(name: str, output: Output, expected: list[PlainOutput]) -> None:
    for completion, plain in zip(output.completions, expected, strict=True):
        assert (completion.token_ids, completion.finish_reason) == (plain.token_ids, plain.finish_reason), name


def test_every_row_changes_the_answer_of_its_prompt(served: Served) -> None:
    """Otherwise the equality below would prove nothing."""
    filters_only = {"plain", "top_k off"}  # greedy answers do not change with filters
    for name, prompt, params in asked(served):
        plain = SamplingParams(max_tokens=MAX_TOKENS, temperature=params.temperature, seed=params.seed)
        answers = [served.reference.samples(prompt, each)[0].token_ids for each in (params, plain)]
        is_filter = name in ("top_k", "top_p", "min_p") and params.temperature == 0
        if not (name in filters_only or is_filter or name in ("no thinking",)):
            assert answers[0] != answers[1], (name, params.temperature)


def test_alone_and_in_a_mixed_batch_every_row_gives_the_tokens_of_its_definition(
    served: Served, engine: Pipeline
) -> None:
    requests = asked(served)
    expected = [served.reference.samples(prompt, params) for _, prompt, params in requests]
    client = engine.client
    client.clear_cache()
    for (name, prompt, params), plain in zip(requests, expected, strict=True):
        assert_equal(f"{name}, alone", client.generate(prompt, params), plain)
    client.clear_cache()
    before = client.stats()["scheduler"]
    # The second time, the prefixes are cached, and there are two samples.
    mixed = [(i, SamplingParams(**{**_fields(requests[i][2]), "n": n})) for n in (1, 2) for i in range(len(requests))]
    random.Random(1).shuffle(mixed)
    outputs = client.generate_batch([requests[i][1] for i, _ in mixed], [params for _, params in mixed])
    for (i, params), output in zip(mixed, outputs, strict=True):
        plain = served.reference.samples(requests[i][1], params)
        assert_equal(f"{requests[i][0]}, mixed, n = {params.n}", output, plain)
    after = client.stats()["scheduler"]
    assert after["num_preemptions"] > before["num_preemptions"]
    assert after["num_cached_tokens"] > before["num_cached_tokens"]


def test_each_of_several_samples_follows_its_request(served: Served, engine: Pipeline) -> None:
    requests = [(name, prompt, params) for name, prompt, params in asked(served) if params.temperature > 0]
    several = [SamplingParams(**{**_fields(params), "n": 3}) for _, _, params in requests]
    outputs = engine.client.generate_batch([prompt for _, prompt, _ in requests], several)
    for (name, prompt, _), params, output in zip(requests, several, outputs, strict=True):
        assert_equal(f"{name}, n = 3", output, served.reference.samples(prompt, params))


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_log_probabilities_are_those_of_the_definition(served: Served, engine: Pipeline, mode: str) -> None:
    wanted = [3, 50, 7]
    requests = [
        (name, prompt, SamplingParams(**{
            **_fields(params), "logprobs": 3, "logprob_token_ids": wanted, "logprobs_mode": mode,
        }))
        for name, prompt, params in asked(served)
    ]  # fmt: skip
    outputs = engine.client.generate_batch([prompt for _, prompt, _ in requests], [params for _, _, params in requests])
    for (name, prompt, params), output in zip(requests, outputs, strict=True):
        [plain] = served.reference.samples(prompt, params)
        assert output.token_ids == plain.token_ids, name
        assert output.logprobs is not None
        assert len(output.logprobs) == len(plain.logprobs)
        for entry, row in zip(output.logprobs, plain.logprobs, strict=True):
            assert entry.logprob == pytest.approx(row[entry.token_id], abs=1e-4), name
            for token, value in [*entry.top.items(), *entry.requested.items()]:
                assert value == pytest.approx(row[token], abs=1e-4), (name, token)
            assert list(entry.requested) == wanted
            likeliest = sorted((value for value in row), reverse=True)[:3]
            assert list(entry.top.values()) == pytest.approx(likeliest, abs=1e-4), name


def test_the_prompts_log_probabilities_are_those_of_one_plain_forward(served: Served, engine: Pipeline) -> None:
    requests = [
        (prompt, SamplingParams(**{**_fields(params), "prompt_logprobs": 2}))
        for name, prompt, params in asked(served)
        if name in ("plain", "everything", "truncate_prompt_tokens", "choice")
    ]
    outputs = engine.client.generate_batch([prompt for prompt, _ in requests], [params for _, params in requests])
    for (prompt, params), output in zip(requests, outputs, strict=True):
        expected = served.reference.prompt_logprobs(prompt, params)
        assert output.token_ids == served.reference.samples(prompt, params)[0].token_ids
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == len(expected)
        for entry, row in zip(output.prompt_logprobs[1:], expected[1:], strict=True):
            assert entry is not None
            assert row is not None
            assert entry.logprob == pytest.approx(row[entry.token_id], abs=1e-4)
            assert list(entry.top.values()) == pytest.approx(sorted(row, reverse=True)[:2], abs=1e-4)


def _fields(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in params.__struct_fields__}


def test_a_thinking_budget_ends_the_reasoning_before_a_grammar(served: Served, engine: Pipeline) -> None:
    """The random model writes many tokens that begin a character, so the budget often ends inside one."""
    choices, budget, end = ["a fox", "the dog"], 5, served.id("</think>")
    spec = StructuredOutputs(choice=choices, after_reasoning=["</think>"])
    prompt = [*served.tokenizer.encode("fox", add_special_tokens=False).ids, served.id("<think>")]
    params = [
        SamplingParams(
            max_tokens=40,
            temperature=1.0,
            seed=seed,
            structured_outputs=spec,
            thinking_token_budget=budget * (seed > 0),
        )
        for seed in range(12)
    ]
    for output, asked_for in zip(engine.client.generate_batch([prompt] * 12, params), params, strict=True):
        assert output.finish_reason == "stop", output.error
        at = output.token_ids.index(end)
        assert at <= (asked_for.thinking_token_budget or 0)
        answer = [token_id for token_id in output.token_ids[at + 1 :] if token_id != served.id(EOS)]
        assert served.tokenizer.decode(answer) in choices
