"""Log-probabilities of prompts on the device: which token follows, and the numbers, beside plain torch."""

from __future__ import annotations

from random import Random

import pytest
import torch

from ipc.records import NO_TOKEN, StepShape, result_layout
from ipc.sampling_params import MAX_LOGPROBS
from tests.reference.step_records import Prepared, Reference, fill_step
from workers.gpu.execution.prompt_logprobs import max_logits_rows, next_tokens, write_prompt_logprobs
from workers.gpu.execution.tensor_views import ResultTensors, tensor_views

SHAPE = StepShape(max_num_seqs=6, max_num_batched_tokens=40, max_model_len=32, block_size=4)
NUM_BLOCKS = 48

torch.set_num_threads(1)


@pytest.mark.parametrize("pad", [False, True])
def test_each_token_of_a_batch_is_followed_by_the_next_id_of_its_row(pad: bool) -> None:
    random = Random(3)
    prepared, reference = Prepared(SHAPE, NUM_BLOCKS, seed=5), Reference(SHAPE, NUM_BLOCKS)
    ids = prepared.tables.token_ids.tolist()
    for k in range(4):
        sequences = fill_step(prepared.step, random, reference, list(range(6)) if k == 0 else [])
        num_tokens = sum(count for _, count in sequences)
        bucket = (SHAPE.max_num_seqs, SHAPE.max_num_batched_tokens) if pad else (len(sequences), num_tokens)
        batch = prepared.prepare.batch(*bucket)
        prepared.prepare.admit()
        prepared.prepare.append()
        prepared.prepare.filler(batch)()
        tokens = [(row, reference.computed[row] + i) for row, count in sequences for i in range(count)]
        places = [place for place, (_, position) in enumerate(tokens) if position + 1 < SHAPE.max_model_len]
        followers = next_tokens(batch, torch.tensor(places), prepared.tables)
        assert followers.tolist() == [ids[tokens[place][0]][tokens[place][1] + 1] for place in places]
        reference.finish(sequences)
        prepared.finish(sequences)


@pytest.mark.parametrize("vocab_size", [300, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_numbers_are_those_of_the_log_softmax(vocab_size: int, dtype: torch.dtype) -> None:
    layout = result_layout(SHAPE)
    result = tensor_views(ResultTensors, layout, torch.full((layout.num_bytes,), 0xEE, dtype=torch.uint8))
    generator = torch.Generator().manual_seed(2)
    logits = (40 * torch.randn(5, vocab_size, generator=generator)).to(dtype)
    logits[1] += 1000  # the exponentials of the logits themselves would overflow
    tokens = torch.randint(vocab_size, (5,), generator=generator)
    write_prompt_logprobs(logits, tokens, result, 2)
    expected = logits.double().log_softmax(-1).float()
    near = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(result.prompt_logprob[2:7], expected.gather(1, tokens[:, None])[:, 0], **near)
    num_top = min(MAX_LOGPROBS, vocab_size)
    torch.testing.assert_close(result.prompt_top_logprobs[2:7, :num_top], expected.topk(num_top).values, **near)
    chosen = result.prompt_top_ids[2:7, :num_top].long()
    torch.testing.assert_close(expected.gather(1, chosen), expected.topk(num_top).values, **near)
    assert (result.prompt_top_ids[2:7, num_top:] == NO_TOKEN).all()
    assert (result.prompt_top_logprobs[2:7, num_top:] == -torch.inf).all()
    untouched = torch.tensor(0xEEEEEEEE - 2**32, dtype=torch.int32)
    for column in (result.prompt_logprob, result.prompt_top_ids, result.prompt_top_logprobs, result.top_ids):
        others = column.view(torch.int32) if column is result.top_ids else column.view(torch.int32)[[0, 1, 7, -1]]
        assert (others == untouched).all()


def test_few_rows_of_logits_lie_in_memory_at_a_time() -> None:
    def rows(num_seqs: int, num_tokens: int) -> int:
        return max_logits_rows(StepShape(num_seqs, num_tokens, 4096, 16))

    assert rows(4, 8192) == 64
    assert rows(256, 8192) == 256
    assert rows(1024, 8192) == 512, "no step has more positions"
    assert rows(4, 32) == 32
