"""Long prompts beside streams: chunks that keep the time between two tokens."""

from __future__ import annotations

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
