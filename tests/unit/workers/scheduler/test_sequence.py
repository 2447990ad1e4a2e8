"""A sequence's admission entry: every column is written, whatever the record held before."""

from __future__ import annotations

import numpy as np
import pytest

from ipc.long_values import LOGPROB_IDS, encode_long_values
from ipc.messages import Route, Tokenized
from ipc.record_layout import declared_fields
from ipc.records import MAX_END_IDS, Admissions, StepShape, step_layout
from ipc.sampling_params import SamplingParams
from workers.scheduler.prompt_lease import PromptLease
from workers.scheduler.sequence import Sequence

SHAPE = StepShape(max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64, block_size=4)


@pytest.mark.parametrize("leftover", [0x00, 0xEE])
def test_an_admission_writes_every_column_of_its_entry_and_no_other_entry(leftover: int) -> None:
    params = SamplingParams(
        temperature=0.5, top_k=7, top_p=0.75, min_p=0.25, seed=3, stop_token_ids=[9], repetition_penalty=1.5,
        presence_penalty=0.25, frequency_penalty=-0.25, min_tokens=6, thinking_token_budget=11,
        logprobs=0, logprobs_mode="processed_logprobs",
    )  # fmt: skip
    route = Route(client=b"c", request_id="r", stream=True)
    message = Tokenized(
        key=1, route=route, params=params, ring=1, ticket=8, num_prompt_tokens=3, arrived_ns=0, thinking=(20, 21),
        long_values=encode_long_values(SHAPE, {"logprob_ids": [4]}),
    )  # fmt: skip
    lease = PromptLease(1, 8, 1, 3, is_waiting=True)
    sequence = Sequence(message, 12, np.array([4, 5, 6], np.int32), lease, [2])
    sequence.row = 3
    layout = step_layout(SHAPE)
    admit = layout.views(memoryview(bytearray([leftover]) * layout.num_bytes)).admit
    before = {field.path[0]: getattr(admit, field.path[0]).copy() for field in declared_fields(Admissions)}
    sequence.write_admission(admit, 1, 2, lease, PromptLease(0, 17, 2, 5000, is_waiting=False))
    written = {name: getattr(admit, name)[1].tolist() for name in before}
    assert written == {
        "row": 3, "ring": 1, "ticket": 8, "length": 3, "num_computed_tokens": 2, "max_len": 12, "temperature": 0.5,
        "top_k": 7, "top_p": 0.75, "min_p": 0.25, "seed": 3, "end_ids": [2, 9] + [-1] * (MAX_END_IDS - 2),
        "prompt_len": 3, "repetition_penalty": 1.5, "presence_penalty": 0.25, "frequency_penalty": -0.25,
        "min_tokens": 6, "think_budget": 11, "think_start": 20, "think_end": 21, "long_columns": LOGPROB_IDS,
        "long_ticket": 17, "processed_logprobs": 1,
    }  # fmt: skip
    for name, old in before.items():
        assert np.array_equal(np.delete(getattr(admit, name), 1, 0), np.delete(old, 1, 0)), name
