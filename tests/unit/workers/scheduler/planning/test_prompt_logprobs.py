"""Requests for the log-probabilities of their prompts: what steps ask for, what they limit, what is delivered."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ipc import records
from ipc.sampling_params import SamplingParams
from tests.simulation.scheduled_engine import ScheduledEngine


@pytest.fixture(autouse=True)
def _six_positions_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_PROMPT_LOGPROBS", 6)


def asks(num_top: int = 2, *, max_tokens: int = 2, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, prompt_logprobs=num_top, **more)


def plan(engine: ScheduledEngine) -> tuple[list[int], list[int]]:
    """Plan and run a step. Returns the tokens of each sequence, and the places whose followers are scored."""
    record = engine.plan()
    assert record is not None
    counts = record.seq_num_tokens[: record.num_seqs[0]].tolist()
    places = record.prompt_logprob_index[: record.num_prompt_logprobs[0]].tolist()
    engine.run_device()
    return counts, places


def check_delivered(engine: ScheduledEngine, key: int, prompt: list[int], num_top: int, num: int | None = None) -> None:
    """The first `num` positions (None = all) have been delivered once, in order, with their alternatives."""
    end = len(prompt) if num is None else 1 + num
    parts = engine.prompt_parts.get(key, [])
    columns = [part.columns for part in parts]
    assert [token for part in parts for token in np.frombuffer(part.token_ids, "<i4").tolist()] == prompt[1:end]
    logprobs = [value for each in columns for value in np.frombuffer(each.logprobs, "<f4").tolist()]
    assert logprobs == [-i - prompt[i] / 64 for i in range(1, end)]
    top_ids = [token for each in columns for token in np.frombuffer(each.top_ids, "<i4").tolist()]
    assert top_ids == [i + k for i in range(1, end) for k in range(num_top)]
    top_logprobs = [value for each in columns for value in np.frombuffer(each.top_logprobs, "<f4").tolist()]
    assert top_logprobs == [-value for value in top_ids]


def test_chunks_ask_for_each_position_once_and_leave_the_other_tokens_to_other_requests() -> None:
    engine = ScheduledEngine(max_num_batched_tokens=16, depth=1)
    first, plain, second = list(range(9)), list(range(20, 32)), list(range(40, 45))
    engine.send(1, first, asks())
    engine.send(2, plain, SamplingParams(max_tokens=1))
    engine.send(3, second, asks(0))
    assert plan(engine) == ([6, 10], [0, 1, 2, 3, 4, 5])  # request 3 must wait: no position is left
    engine.apply()
    # The last of the nine tokens has no follower yet; of the five, three fit.
    assert plan(engine) == ([3, 2, 3], [0, 1, 5, 6, 7])
    engine.apply()
    assert plan(engine)[1] == [1]
    engine.apply()
    engine.drain()
    check_delivered(engine, 1, first, 2)
    check_delivered(engine, 3, second, 0)
    assert 2 not in engine.prompt_parts
    engine.check_empty()


@pytest.mark.parametrize("depth", [1, 3])
def test_a_prompt_is_delivered_before_its_first_token_and_only_for_sample_0(depth: int) -> None:
    engine = ScheduledEngine(depth=depth)
    prompt = list(range(23))
    engine.send(1, prompt, asks(3, n=3, temperature=1.0, seed=4))
    engine.drain()
    check_delivered(engine, 1, prompt, 3)
    assert set(engine.prompt_parts) == {1}
    plain = ScheduledEngine(depth=depth)
    plain.send(1, prompt, SamplingParams(max_tokens=2, n=3, temperature=1.0, seed=4))
    plain.drain()
    assert engine.tokens == plain.tokens
    engine.check_empty()


def test_such_a_request_uses_no_cached_blocks_and_offers_its_own() -> None:
    engine = ScheduledEngine()
    prompt = list(range(17))
    for key in (1, 2):  # the second would find four blocks of the first
        engine.send(key, prompt, asks())
        engine.drain()
        check_delivered(engine, key, prompt, 2)
    assert not engine.cached
    engine.send(3, prompt)
    engine.drain()
    assert engine.cached == {3: 16}


def test_a_resumed_request_asks_for_nothing_again_and_may_use_the_cache() -> None:
    engine = ScheduledEngine(max_num_seqs=2, num_blocks=9, max_model_len=32, depth=1)
    prompt = list(range(10))
    engine.send(1, list(range(30, 42)), SamplingParams(max_tokens=16))
    engine.send(2, prompt, asks(1, max_tokens=20))
    engine.drain()
    assert engine.scheduler.gauges()["num_preemptions"] > 0
    check_delivered(engine, 2, prompt, 1)
    assert len(engine.tokens[2]) == 20
    engine.check_empty()


def test_a_request_of_one_token_asks_for_nothing() -> None:
    engine = ScheduledEngine(depth=1)
    engine.send(1, [5], asks())
    assert plan(engine) == ([1], [])
    engine.apply()
    engine.drain()
    assert not engine.prompt_parts


@pytest.mark.parametrize("depth", [1, 3])
def test_what_was_computed_before_a_cancellation_is_delivered_and_what_comes_later_is_not(depth: int) -> None:
    engine = ScheduledEngine(depth=depth)
    prompt = list(range(40))
    engine.send(1, prompt, asks())
    for _ in range(depth):
        engine.plan()
    engine.apply()
    engine.scheduler.cancel([1])
    engine.send(2, list(range(8)), asks(1))  # in the row of the first, once its steps have been applied
    engine.drain()
    check_delivered(engine, 1, prompt, 2, num=6)
    assert engine.ends[1] == "cancelled"
    check_delivered(engine, 2, list(range(8)), 1)
    engine.check_empty()


def test_a_prompt_that_leaves_tokens_keeps_the_blocks_that_it_still_needs() -> None:
    """Without the reservation, the second prompt would take them, and neither could be preempted for the other."""
    engine = ScheduledEngine(max_num_seqs=4, max_num_batched_tokens=24, max_model_len=32, num_blocks=12, depth=1)
    prompt = list(range(30))
    engine.send(1, prompt, asks(max_tokens=1))  # six tokens in each step, eight blocks
    engine.send(2, [2] * 29, SamplingParams(max_tokens=3))  # of eighteen tokens in the first step
    engine.send(3, [3] * 7, SamplingParams(max_tokens=3))
    engine.drain()
    check_delivered(engine, 1, prompt, 2)
    assert [len(engine.tokens[key]) for key in (1, 2, 3)] == [1, 3, 3]
    engine.check_empty()
