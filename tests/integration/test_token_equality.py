"""The whole pipeline against transformers' own `generate`: the same tokens, id for id, in float32."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pipeline import Pipeline, SamplingParams
from tests.reference.tiny_models import FAMILIES, make_tiny_model, reference_generate
from tests.unit.workers.text.tools import byte_level_tokenizer

MAX_NEW_TOKENS = 20
# Small enough that prompts take several chunks, requests queue for a row, and sequences are preempted for blocks.
TIGHT = {
    "scheduler.max_num_seqs": 4,
    "scheduler.max_num_batched_tokens": 16,
    "scheduler.max_model_len": 96,
    "cache.block_size": 4,
    "cache.num_blocks": 25,
}


def config(folder: Path, **overrides: object) -> dict[str, dict[str, object]]:
    sections: dict[str, dict[str, object]] = {
        "model": {"path": str(folder), "dtype": "float32", "device": "cpu", "num_threads": 1}
    }
    for name, value in {**TIGHT, **overrides}.items():
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = value
    return sections


def make_folder(family: str, folder: Path, seed: int) -> None:
    """A random model with a tokenizer, which decodes its tokens to arbitrary text."""
    make_tiny_model(family, folder, seed)
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))


def mixed_prompts(seed: int, count: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(5, 190) for _ in range(draw.choice([1, 3, 7, 15, 16, 17, 33, 60]))] for _ in range(count)]


FEW_FAMILIES = ("llama", "gemma2")  # full attention; windows in every other layer and soft caps
EVERY_FAMILY = [
    family if family in FEW_FAMILIES else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES
]


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_greedy_tokens_equal_those_of_generate_computed_and_cached(family: str, tmp_path: Path) -> None:
    make_folder(family, tmp_path, seed=1)
    prompts = mixed_prompts(seed=2, count=12)
    beginning, *ends = mixed_prompts(seed=6, count=13)
    alike = [((beginning * 40)[:40] + end)[:70] for end in ends]
    expected = reference_generate(tmp_path, prompts, MAX_NEW_TOKENS)
    expected_alike = reference_generate(tmp_path, alike, MAX_NEW_TOKENS)
    with Pipeline(config(tmp_path)) as pipeline:
        client, params = pipeline.client, SamplingParams(max_tokens=MAX_NEW_TOKENS)
        # Both samples of a request are queued together, and those of the long prompts need more blocks than there are.
        # So there are preemptions, however slowly requests arrive.
        twice = SamplingParams(max_tokens=MAX_NEW_TOKENS, n=2)
        outputs = client.generate_batch(prompts, twice)
        stats = client.stats()["scheduler"]
        first = client.generate_batch(alike, params)
        again = client.generate_batch(alike, twice)
        salted = client.generate(alike[0], params, cache_salt="another tenant")
        client.clear_cache()
        cleared = client.generate(alike[0], params)
        warm = client.generate(alike[0], params)
        stats_alike = client.stats()["scheduler"]
    assert [[c.token_ids for c in output.completions] for output in outputs] == [[ids, ids] for ids in expected]
    assert [output.token_ids for output in first] == expected_alike
    assert [[c.token_ids for c in output.completions] for output in again] == [[ids, ids] for ids in expected_alike]
    assert [output.token_ids for output in (salted, cleared, warm)] == [expected_alike[0]] * 3
    cached = [output.usage.num_cached_tokens if output.usage else -1 for output in (salted, cleared, warm)]
    assert cached == [0, 0, (len(alike[0]) - 1) // 4 * 4]
    assert stats_alike["num_cached_tokens"] - stats["num_cached_tokens"] > 40 * len(alike) // 2
    num_preemptions = stats["num_preemptions"], stats_alike["num_preemptions"] - stats["num_preemptions"]
    assert min(num_preemptions) > 0


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("llama")
    make_folder("llama", folder, seed=3)
    return folder


@pytest.mark.parametrize(
    "engines", [[(1, 1), (4, 3)], pytest.param([(1, 1), (2, 1), (3, 3), (4, 3)], marks=pytest.mark.slow)], ids=len
)
def test_depth_order_and_number_of_tokenizers_change_no_token_and_samples_are_requests_of_their_own(
    engines: list[tuple[int, int]], llama: Path
) -> None:
    prompts = mixed_prompts(seed=4, count=24)
    params = [
        SamplingParams(
            max_tokens=MAX_NEW_TOKENS, temperature=(i % 3) * 0.8, seed=i, top_k=(i % 4) * 9, top_p=1 - (i % 5) / 9,
            n=3 if i % 6 == 1 else 1,
        )
        for i in range(len(prompts))
    ]  # fmt: skip
    alone = [(i, sample) for i, p in enumerate(params) for sample in range(p.n) if p.n > 1]
    prompts += [prompts[i] for i, _ in alone]
    params += [params[i].of_sample(sample) for i, sample in alone]
    order = list(range(len(prompts)))
    results = []
    for depth, num_tokenizers in engines:
        random.Random(depth).shuffle(order)
        overrides = {"ring.depth": depth, "tokenizer.num_workers": num_tokenizers}
        with Pipeline(config(llama, **overrides)) as pipeline:
            outputs = pipeline.client.generate_batch([prompts[i] for i in order], [params[i] for i in order])
        results.append({i: [c.token_ids for c in output.completions] for i, output in zip(order, outputs, strict=True)})
    assert all(result == results[0] for result in results[1:])
    assert len({tuple(ids) for samples in results[0].values() for ids in samples}) > len(prompts) // 2
    assert [results[0][i][sample] for i, sample in alone] == [results[0][24 + j][0] for j in range(len(alone))]
