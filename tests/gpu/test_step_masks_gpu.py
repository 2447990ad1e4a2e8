"""Masks on a GPU: they reach the adjustment of their own step, between graphs and from page-locked rings."""

from __future__ import annotations

from random import Random

import pytest
import torch
from msgspec.structs import replace

from ipc.records import NO_TOKEN
from tests.unit.workers.gpu.execution.test_step_masks import SHAPE, TIMEOUT_NS, Engine, tokens
from workers.gpu.device.choose import make_device
from workers.gpu.execution.buckets import Buckets
from workers.gpu.execution.null_model import NullModel

pytestmark = pytest.mark.gpu

WIDE = replace(SHAPE, vocab_size=64, max_model_len=128)


def test_every_step_gets_its_own_masks_and_a_missing_mask_is_closed() -> None:
    random = Random(0)
    device = make_device("cuda")
    runner = NullModel(WIDE, device.torch_device, lambda: None)
    with torch.inference_mode():
        engine = Engine(device, shape=WIDE, runner=runner, buckets=Buckets(WIDE))
        engine.executor.warm_up(lambda _: None)
        for step in range(1, 101):
            num_masks = random.choice([(1, 1), (2, 1), (1, 2)])
            allowed = [[random.randrange(WIDE.vocab_size) for _ in range(num)] for num in num_masks]
            missing = random.choice((None, None, 0, 1))
            engine.plan(*num_masks, num_free=random.randrange(2))
            assert engine.submit() is None
            for worker, chosen in enumerate(allowed):
                if worker != missing:
                    engine.answer(worker, step, *chosen)
            engine.now_ns += TIMEOUT_NS
            assert engine.submit() is not None
            expected = [NO_TOKEN if w == missing else token for w, chosen in enumerate(allowed) for token in chosen]
            assert engine.results()[: len(expected)] == tokens(*expected), f"step {step}"
            if missing is not None:
                engine.answer(missing, step, *allowed[missing])
                assert engine.submit() is None
            assert engine.is_released(0)
            assert engine.is_released(1)
