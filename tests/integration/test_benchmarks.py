"""Small runs of the benchmarks that drive a whole engine. Tests the figures that must hold on any machine."""

from __future__ import annotations

import asyncio

import pytest

from pipeline.bench import grammar, http, overload, prefix
from tests.integration.conftest import TINY_CONFIG

pytestmark = pytest.mark.slow


def test_an_overloaded_engine_refuses_what_it_cannot_hold_and_recovers() -> None:
    # 40 times the rate is more in half a second than the engine holds, even on a machine that is 10 times slower.
    (calm, over, again), rest, memory = overload.measure(TINY_CONFIG, seconds=0.5, calm_seconds=0.5, times=40.0)
    assert not calm.refused
    assert not again.refused
    assert over.refused
    assert len(over.taken) >= overload.NUM_SEQS
    assert rest["num_refused"] == len(over.refused)
    held = {name: value for name, value in rest.items() if name not in ("sustainable_per_s", "num_refused")}
    assert set(held.values()) == {0}, held
    assert all(values for values in memory.values())


def test_shared_beginnings_are_computed_once() -> None:
    prompts = prefix.make_prompts(num_requests=4, num_prefixes=2, prefix_tokens=512)
    assert len({tuple(prompt[:512]) for prompt in prompts}) == 2
    figures = prefix.measure(TINY_CONFIG, prompts, max_tokens=1, prefix_caching=True)
    own = 4 * prefix.TAIL_TOKENS
    assert figures["num_prompt_tokens"] == 4 * 512 + own
    # A request may be admitted while its shared beginning is still being computed, and then computes the end of it
    # again.
    assert 2 * 512 + own <= figures["num_computed_prompt_tokens"] < 3 * 512 + own


def test_masks_come_while_the_model_runs() -> None:
    found = grammar.measure(TINY_CONFIG, [], num_seqs=4, step_ms=20.0, share=0.5, seconds=1.0)
    figures = found.as_dict()
    assert figures["num_masked_steps"] > 20
    assert figures["num_late_masks"] == 0
    assert 0 < figures["mask_path_p50_ms"] <= figures["mask_path_p99_ms"]
    assert figures["mask_wait_share"] < 0.5, "masks take far less than 20 ms"
    none = grammar.measure(TINY_CONFIG, [], num_seqs=2, step_ms=5.0, share=0.0, seconds=0.5)
    assert none.as_dict()["num_masked_steps"] == none.figures.device.masks_ns == 0


def test_every_token_of_a_stream_is_an_event() -> None:
    found = http.measure(TINY_CONFIG, [], num_streams=2, step_ms=20.0, seconds=1.0)
    assert found.events_per_s > 20, "two streams with 50 tokens/s each"
    assert 0.8 < found.tokens_per_event < 4, "a busy machine sends some tokens together"
    assert found.us_per_event > 0
    assert found.us_per_request is not None
    assert 0 < found.us_per_request < 20_000
    assert found.added_ttft_p50_ms is not None
    bare = asyncio.run(http.measure_bare(num_streams=2, step_ms=20.0, seconds=0.5))
    assert bare.events_per_s > 20
    assert bare.us_per_event > 0
