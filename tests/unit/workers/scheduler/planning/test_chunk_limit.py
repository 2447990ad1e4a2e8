"""Long prompts beside streams: chunks that keep the time between two tokens."""

from __future__ import annotations

import random
import statistics
from typing import Any

import pytest

from ipc.sampling_params import SamplingParams
from tests.simulation.scheduled_engine import ScheduledEngine
from workers.scheduler.planning.chunk_limit import MIN_CHUNK, ChunkLimit

BASE_S, TOKEN_S = 0.004, 0.00002


def taught(bound_s: float, steps: list[int]) -> ChunkLimit:
    limit = ChunkLimit(bound_s)
    for num_tokens in steps:
        limit.add_step(num_tokens, BASE_S + num_tokens * TOKEN_S)
    return limit


def test_without_a_bound_nothing_is_limited() -> None:
    limit = ChunkLimit(None)
    limit.add_step(1_000, 5.0)
    limit.add_step(0, 0.1)
    assert limit.max_tokens(8_192) == 8_192


def test_the_chunk_fills_the_bound_once_two_kinds_of_step_have_been_seen() -> None:
    assert taught(0.010, []).max_tokens(8_192) == 8_192
    assert taught(0.010, [0, 0, 0]).max_tokens(8_192) == 8_192
    assert taught(0.010, [0, 2_000]).max_tokens(8_192) == pytest.approx(300, abs=1)
    assert taught(0.010, [0, 2_000, 0, 500, 700, 0]).max_tokens(8_192) == pytest.approx(300, abs=1)
    assert taught(0.010, [0, 2_000]).max_tokens(100) == 100


def test_what_was_learnt_outlives_a_long_time_without_prompts() -> None:
    assert taught(0.010, [0, 2_000, *[0] * 1_000]).max_tokens(8_192) == pytest.approx(300, abs=1)


def test_chunks_of_one_size_alone_do_not_unlearn_the_slope() -> None:
    assert taught(0.010, [0, 2_000, *[300] * 2_000]).max_tokens(8_192) == pytest.approx(300, abs=1)


def test_a_bound_that_cannot_be_kept_still_lets_prompts_on() -> None:
    assert taught(0.001, [0, 2_000]).max_tokens(8_192) == MIN_CHUNK


def test_a_device_that_gets_slower_gets_smaller_chunks() -> None:
    limit = taught(0.010, [0, 2_000, 0, 300, 300])
    for _ in range(200):
        num_tokens = limit.max_tokens(8_192)
        limit.add_step(num_tokens, BASE_S + num_tokens * 3 * TOKEN_S)
        limit.add_step(0, BASE_S)
    assert limit.max_tokens(8_192) == pytest.approx(100, rel=0.15)


@pytest.mark.parametrize("seed", range(5))
def test_the_bound_is_kept_while_step_times_vary_and_the_batch_grows(seed: int) -> None:
    """Prompts of 500 to 2,000 tokens arrive at random. Pure decode takes 5 to 9 ms, each step by up to 10 % more."""
    draw = random.Random(seed)
    bound_s, token_s = 0.025, 20e-6
    limit = ChunkLimit(bound_s)
    times, chunks, waiting = [], [], 0
    for i in range(6_000):
        if draw.random() < 0.05:
            waiting += draw.randint(500, 2_000)
        chunk = min(waiting, limit.max_tokens(8_192))
        waiting -= chunk
        duration_s = (0.005 + 0.004 * i / 6_000) * draw.uniform(1.0, 1.1) + chunk * token_s * draw.uniform(1.0, 1.05)
        limit.add_step(chunk, duration_s)
        if i > 200 and chunk:
            times.append(duration_s)
            chunks.append(chunk)
    assert sorted(times)[int(len(times) * 0.99)] <= bound_s * 1.06
    assert statistics.mean(times) >= 0.8 * bound_s, "the chunks use the time that they may take"


def test_a_batch_that_grows_without_a_pure_decode_step_keeps_the_bound() -> None:
    limit = taught(0.025, [0, 1_000])
    for i in range(200):
        chunk = limit.max_tokens(8_192)
        duration_s = BASE_S + 0.00005 * i + chunk * TOKEN_S
        limit.add_step(chunk, duration_s)
        assert duration_s <= 0.0262


def run_beside_streams(max_itl_ms: float | None) -> tuple[list[float], Any]:
    """Times in ms of the steps in which a stream gets a token while long prompts arrive, after the first of them."""
    engine = ScheduledEngine(
        max_num_seqs=4, max_num_batched_tokens=512, max_model_len=512, num_blocks=600, prompt_records=300,
        max_itl_ms=max_itl_ms,
    )  # fmt: skip
    times = []

    def step() -> None:
        while engine.scheduler.num_in_flight < 2 and (record := engine.plan()) is not None:
            engine.gpu.step_ns = round((BASE_S + TOKEN_S * int(record.num_tokens[0] - record.num_seqs[0])) * 1e9)
            if 1 in record.seq_sample[: int(record.num_seqs[0])].tolist():
                times.append(engine.gpu.step_ns / 1e6)
            engine.run_device()
        engine.apply()
        engine.hear()

    engine.send(1, [1], SamplingParams(max_tokens=400))
    for _ in range(5):
        step()
    engine.send(2, [2] * 500, SamplingParams(max_tokens=2))
    for _ in range(20):
        step()
    times.clear()
    for key in range(3, 13):
        engine.send(key, [key] * 500, SamplingParams(max_tokens=2))
        for _ in range(12):
            step()
    return times, engine


def test_a_stream_gets_its_tokens_in_time_while_long_prompts_are_computed() -> None:
    unbounded, _ = run_beside_streams(None)
    assert max(unbounded) > 13
    bounded, engine = run_beside_streams(6.0)
    assert max(bounded) <= 6.1
    assert {key for key, reason in engine.ends.items() if reason == "length"} >= set(range(2, 12)), "prompts wait"
