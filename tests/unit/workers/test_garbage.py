"""Requests leave no reference cycles: workers collect garbage only when they are idle (`workers/process.py`)."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ipc.sampling_params import SamplingParams
from tests.simulation.scheduled_engine import ScheduledEngine
from tests.unit.workers.text.test_interleavings import Engine
from tests.unit.workers.text.tools import encoded_chat, user_chat
from tests.unit.workers.tokenizer.test_tokenizer import encoder, request, save


@contextmanager
def no_garbage() -> Iterator[None]:
    """Collections look only at what the block made: what other tests have left costs nothing once it is frozen."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_gateway_and_detokenizer_leave_no_garbage_whatever_comes_late() -> None:
    def live(engine: Engine) -> None:
        for _ in range(400):
            engine.anything()
        engine.come_to_rest()

    live(Engine(random.Random(0)))  # msgspec makes its decoders
    engines = [Engine(random.Random(seed)) for seed in range(10)]
    with no_garbage():
        for engine in engines:
            live(engine)


@pytest.mark.parametrize("policy", ["fifo", "priority", "fair"])
def test_the_scheduler_leaves_no_garbage_however_requests_end(policy: str) -> None:
    engine = ScheduledEngine(policy=policy, num_blocks=20, max_num_waiting=6)  # preempts, and refuses
    with no_garbage():
        for key in range(0, 80, 4):
            for sample, max_tokens in enumerate((1, 30)):
                params = SamplingParams(max_tokens=max_tokens, n=2, temperature=1.0, seed=key)
                engine.send(key + 2 * sample, [key, 1, 2, 3, 4, 5], params, deadline_ns=key % 3)
            engine.send_error(key + 1_000, "invalid_request", "too long")
            engine.step()
            engine.scheduler.cancel([key])
            engine.clock.now_ns = key
            engine.scheduler.expire()
        engine.drain()
    assert len({*engine.ends.values()}) > 2
    engine.check_empty()


@pytest.mark.parametrize(
    "bad",
    [
        {"chat": user_chat("x")},
        {"chat": encoded_chat([{"role": "user"}])},
        {"prompt": "the fox " * 500},
        {"prompt": "x" * 10_000_000},
        {"token_ids": np.array([1, 1_000], "<i4").tobytes()},
    ],
)
def test_a_refused_prompt_leaves_no_garbage(tmp_path: Path, bad: dict[str, Any]) -> None:
    """Errors that jinja2 raises in a template do leave cycles, so a tokenizer keeps automatic collection on."""
    encode = encoder(save(tmp_path)).encode

    def serve() -> None:
        encoded = encode(request(**bad))  # held by a frame that its error's traceback holds
        assert encoded.error is not None

    serve()
    with no_garbage():
        serve()
