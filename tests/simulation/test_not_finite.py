"""Requests whose activations overflow, among others: they end with an error and affect no other request."""

from __future__ import annotations

import random

import numpy as np
import pytest

from ipc.errors import LogitsNotFinite
from ipc.sampling_params import SamplingParams
from tests.simulation.fake_gpu import VOCAB_SIZE, expected_tokens
from tests.simulation.scheduled_engine import ScheduledEngine

OVERFLOWING = VOCAB_SIZE + 3  # a token id that nothing samples
MAX_LEN = 40


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_requests_that_overflow_end_with_an_error_and_others_get_their_tokens(depth: int) -> None:
    num_failed = num_shared = 0
    for seed in range(60):
        rng = random.Random(seed)
        block_size = rng.choice([1, 2, 4])
        engine = ScheduledEngine(
            depth=depth,
            block_size=block_size,
            max_model_len=MAX_LEN,
            max_num_seqs=rng.choice([2, 5]),
            max_num_batched_tokens=rng.choice([5, 16, 64]),
            num_blocks=rng.choice([1, 3]) * MAX_LEN // block_size,
            prompt_records=200,
        )
        engine.gpu.overflowing = {OVERFLOWING}
        beginning = [rng.randrange(VOCAB_SIZE) for _ in range(12)]
        prompts: dict[int, list[int]] = {}
        samples: dict[int, int] = {}
        for key in range(0, 40, 2):
            prompt = beginning[: rng.randint(0, 12)] + rng.choice([[], [], [OVERFLOWING]])
            prompt += beginning[: rng.randint(1, 12)]
            params = SamplingParams(max_tokens=rng.randint(1, 12), seed=key, n=rng.choice([1, 2]))
            for sample in range(params.n):
                prompts[key + sample], samples[key + sample] = prompt, params.max_tokens or 0
            engine.send(key, prompt, params)
            for _ in range(rng.choice([0, 0, 1, 3])):
                engine.step()
        engine.drain()
        engine.check_empty()
        for key, prompt in prompts.items():
            if OVERFLOWING in prompt:
                num_failed += 1
                assert (engine.ends[key], engine.errors[key][0]) == ("error", LogitsNotFinite.code)
                assert not engine.tokens[key], "a token of logits that are not finite was delivered"
            else:
                own_seed = SamplingParams(seed=key - key % 2, n=2).of_sample(key % 2).seed or 0
                expected = expected_tokens(prompt, own_seed, len(prompt) + samples[key], ())
                assert engine.tokens[key] == expected, f"seed {seed}: an overflow elsewhere changed request {key}"
                num_shared += key in engine.cached
        assert engine.scheduler.counts["num_not_finite"] == sum(OVERFLOWING in prompt for prompt in prompts.values())
        table = engine.scheduler._planner._pool._index
        cached = (table._place >= 0).nonzero()[0]
        kv_slots = cached[:, None] * block_size + np.arange(block_size)
        assert engine.gpu.kv_is_finite[kv_slots].all(), f"seed {seed}: a block that is not finite is cached"
    assert num_failed > 100
    assert num_shared > 100
