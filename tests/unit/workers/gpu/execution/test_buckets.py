"""The sizes that steps are padded to."""

from __future__ import annotations

import pytest
import torch

from ipc.records import StepShape
from workers.gpu.execution.buckets import MAX_CAPTURED_TOKENS, Buckets
from workers.gpu.execution.step_batch import BatchBuffers


@pytest.mark.parametrize("max_num_seqs", [1, 3, 16, 33, 64, 512])
@pytest.mark.parametrize("max_num_batched_tokens", [1, 7, 64, 100, 512, 1000, 8192])
def test_every_step_fits_its_bucket_and_every_bucket_the_buffers(
    max_num_seqs: int, max_num_batched_tokens: int
) -> None:
    shape = StepShape(max_num_seqs, max_num_batched_tokens, max_model_len=64, block_size=16)
    buckets = Buckets(shape)
    captured = set(buckets.captured)
    for num_seqs in {1, 2, 5, 15, 16, 17, 33, 63, 64, 500, 512}:
        if num_seqs > min(max_num_seqs, max_num_batched_tokens):
            continue
        for num_tokens in {num_seqs, num_seqs + 1, 63, 64, 65, 512, 513, 999, 2048, 2049, 8192}:
            if not num_seqs <= num_tokens <= max_num_batched_tokens:
                continue
            bucket = buckets.choose(num_seqs, num_tokens)
            assert num_seqs <= bucket[0] <= max_num_seqs
            assert num_tokens <= bucket[1] <= max_num_batched_tokens
            assert bucket[0] <= bucket[1]
            assert (bucket in captured) == (num_tokens <= MAX_CAPTURED_TOKENS or num_tokens == num_seqs)


def test_decodes_are_padded_by_at_most_a_half() -> None:
    shape = StepShape(max_num_seqs=512, max_num_batched_tokens=8192, max_model_len=64, block_size=16)
    buckets = Buckets(shape)
    assert len(buckets.captured) < 60
    for num_seqs in range(17, 513):
        assert buckets.choose(num_seqs, num_seqs)[0] * 2 <= num_seqs * 3


def test_captured_steps_with_a_prompt_are_padded_by_less_than_128_tokens() -> None:
    buckets = Buckets(StepShape(max_num_seqs=256, max_num_batched_tokens=8192, max_model_len=64, block_size=16))
    for num_tokens in range(65, MAX_CAPTURED_TOKENS + 1):
        assert buckets.choose(20, num_tokens)[1] - num_tokens < 128


def test_steps_too_large_to_be_captured_are_padded_by_less_than_a_tile() -> None:
    buckets = Buckets(StepShape(max_num_seqs=64, max_num_batched_tokens=8192, max_model_len=64, block_size=16))
    for num_tokens in range(MAX_CAPTURED_TOKENS + 1, 8193, 7):
        assert buckets.choose(33, num_tokens)[1] - num_tokens < 64


@pytest.mark.parametrize(("max_num_seqs", "num_tokens"), [(1, 1), (8, 2)])
def test_a_batch_of_one_token_has_a_second_one_where_there_is_room(max_num_seqs: int, num_tokens: int) -> None:
    shape = StepShape(max_num_seqs, max_num_batched_tokens=64, max_model_len=64, block_size=16)
    assert Buckets(shape).choose(1, 1) == (1, 1)
    table = torch.zeros(max_num_seqs + 1, shape.max_blocks_per_seq, dtype=torch.int32)
    buffers = BatchBuffers(shape, lambda size: torch.zeros(size, dtype=torch.uint8), table, {}, pads_one_token=True)
    batch = buffers.batch(1, 1)
    assert (batch.num_seqs, batch.num_tokens, batch.is_one_token) == (num_tokens, num_tokens, num_tokens == 2)
    assert not buffers.batch(min(2, max_num_seqs), 2).is_one_token
