"""What the copies of an admission bring to its row, and what an adjusted step launches and copies beyond others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ipc.errors import RingError
from ipc.long_values import LONG_COLUMNS, encode_long_values, long_columns_of, long_layout
from ipc.records import PROMPT_RECORD_TOKENS, SamplerVariant, StepShape
from tests.simulation.harness import ToyModel
from tests.unit.workers.gpu.execution.test_executor import Ends, publish_step
from workers.gpu.device.base import Accesses
from workers.gpu.device.cpu import CpuDevice
from workers.gpu.execution.executor import Executor

# A token mask is longer than a prompt record.
SHAPE = StepShape(max_num_seqs=3, max_num_batched_tokens=16, max_model_len=32, block_size=4, vocab_size=150_000)
NUM_BLOCKS = 16


class Watched(CpuDevice):
    def __init__(self) -> None:
        self.num_launches = 0

    def launch(self, stream: Any, work: Callable[[], None], accesses: Callable[[], Accesses]) -> None:
        self.num_launches += 1
        super().launch(stream, work, accesses)


def publish_words(ends: Ends, words: Any) -> int:
    """Returns the first ticket."""
    first = ends.prompts.next_ticket
    for start in range(0, len(words), PROMPT_RECORD_TOKENS):
        part = words[start : start + PROMPT_RECORD_TOKENS]
        ends.prompts.claim().token_ids[: len(part)] = part
        ends.prompts.publish()
    return first


@pytest.mark.parametrize(
    "names", [LONG_COLUMNS, ("bad_words", "logprob_ids"), ("token_mask",), ("bias_ids", "bias_values")], ids=str
)
def test_each_long_column_is_copied_whole_to_its_row_and_no_other_is(names: tuple[str, ...]) -> None:
    ends, device, fields = Ends(SHAPE, 1), CpuDevice(), long_layout(SHAPE).fields
    executor = Executor(device, ToyModel(SHAPE, NUM_BLOCKS), SHAPE, 1, NUM_BLOCKS, ends.gpu)
    random = np.random.default_rng(0)
    values = {name: random.integers(1, 2**20, fields[name].num_items) for name in names}
    words = np.frombuffer(encode_long_values(SHAPE, values), np.int32)
    long = {"admit_long_ticket": publish_words(ends, words), "admit_long_columns": long_columns_of(words)}
    publish_step(ends.steps, num_admissions=1, admit_row=1, admit_length=0, **long)
    with torch.inference_mode():
        executor.submit_next(0)
    for name in LONG_COLUMNS:
        table = getattr(executor.tables.long_values, name)
        assert table[1].tolist() == values.get(name, np.zeros(fields[name].num_items)).tolist(), name
        assert not table[[0, 2, 3]].any(), name


def test_an_admission_whose_long_values_are_not_all_published_is_refused() -> None:
    ends, device = Ends(SHAPE, 1), CpuDevice()
    executor = Executor(device, ToyModel(SHAPE, NUM_BLOCKS), SHAPE, 1, NUM_BLOCKS, ends.gpu)
    words = np.frombuffer(encode_long_values(SHAPE, {"token_mask": [1], "logprob_ids": [1]}), np.int32)
    publish_words(ends, words[:PROMPT_RECORD_TOKENS])
    publish_step(ends.steps, num_admissions=1, admit_long_ticket=1, admit_long_columns=long_columns_of(words))
    with torch.inference_mode(), pytest.raises(RingError, match="record 2 is not there"):
        executor.submit_next(0)


def test_only_adjusted_steps_launch_the_adjustment() -> None:
    ends, device = Ends(SHAPE, 1), Watched()
    executor = Executor(device, ToyModel(SHAPE, NUM_BLOCKS), SHAPE, 1, NUM_BLOCKS, ends.gpu)
    for variant in SamplerVariant:
        for want_logprobs in (0, 3):
            device.num_launches = 0
            publish_step(ends.steps, variant=variant, want_logprobs=want_logprobs, seq_mask=-1)
            with torch.inference_mode():
                executor.submit_next(0)
            executor.publish()
            ends.results.take()
            ends.results.release_through(ends.results.next_ticket - 1)
            is_adjusted = variant == SamplerVariant.ADJUSTED
            assert device.num_launches == 2 + is_adjusted, "the model, the adjustment and the sampler"
