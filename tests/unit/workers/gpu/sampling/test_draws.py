"""A million draws for each filter: their counts are those of the probabilities that the definitions give."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ipc.sampling_params import SamplingParams
from tests.reference.plain_adjustments import by_definition
from tests.reference.plain_generation import filtered
from tests.reference.sampler_bench import Bench
from workers.gpu.sampling.sampler import race

pytestmark = pytest.mark.slow

NUM_DRAWS = 1_000_000
PART = 125_000  # draws at a time
LOGITS = [0.3, -1.2, 2.0, 1.1, 0.9, -0.4, 1.7, -2.5, 0.0, 0.6]
IDS = [2, 6, 6, 3, 2, 2]  # of the row: a prompt of two, and four of output

FILTERS: dict[str, dict[str, Any]] = {
    "no filter": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "all filters": {"temperature": 1.3, "top_k": 7, "top_p": 0.9, "min_p": 0.1},
}
ADJUSTMENTS: dict[str, Any] = {
    "repetition_penalty": 1.4, "presence_penalty": 0.3, "frequency_penalty": 0.2, "bias": {1: 2.0, 8: -1.0},
    "allowed": {0, 1, 2, 3, 6, 8, 9},
}  # fmt: skip


@pytest.mark.parametrize("adjusted", [False, True], ids=["raw", "adjusted"])
@pytest.mark.parametrize("name", FILTERS)
def test_a_million_draws_have_the_probabilities_of_the_definitions(name: str, adjusted: bool) -> None:
    params = SamplingParams(**{"temperature": 1.0, **FILTERS[name]})
    logits = by_definition(list(LOGITS), IDS, 2, **ADJUSTMENTS) if adjusted else LOGITS
    kept = filtered([value / params.temperature for value in logits], params)
    weights = [math.exp(value) for value in kept]
    expected = [NUM_DRAWS * weight / sum(weights) for weight in weights]
    counts = draw(logits, params)
    assert [count for count, mean in zip(counts, expected, strict=True) if not mean] == [0] * expected.count(0.0)
    parts = [(count - mean) ** 2 / mean for count, mean in zip(counts, expected, strict=True) if mean]
    # Chi-square with n - 1 degrees of freedom: its mean and six standard deviations.
    freedom = len(parts) - 1
    assert sum(parts) < freedom + 6 * math.sqrt(2 * freedom), (counts, expected)


def draw(logits: list[float], params: SamplingParams) -> list[int]:
    """How often each token wins, with one seed and a million positions."""
    tables = Bench(1).tables
    tables.temperature[0], tables.seed[0] = params.temperature, 12_345
    tables.top_k[0], tables.top_p[0], tables.min_p[0] = params.top_k, params.top_p, params.min_p
    x = torch.tensor(logits).expand(PART, -1)
    rows = torch.zeros(PART, dtype=torch.int32)
    counts = torch.zeros(len(logits), dtype=torch.int64)
    for start in range(0, NUM_DRAWS, PART):
        positions = torch.arange(start, start + PART, dtype=torch.int32)
        scores = race(x, x.amax(-1), rows, positions, tables, filtered=True)
        counts += torch.bincount(scores.argmax(-1), minlength=len(logits))
    return counts.tolist()
