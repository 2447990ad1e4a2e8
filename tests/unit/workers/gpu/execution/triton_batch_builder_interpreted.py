"""BatchBuilder's Triton kernels against its torch code, under Triton's interpreter. Run by test_triton_kernels.py."""

from __future__ import annotations

from functools import partial
from random import Random

import pytest
import torch

from ipc.records import StepShape
from tests.reference.step_records import Prepared, Reference, check_same, fill_step, garbage
from workers.gpu.execution import triton_batch_builder as triton_prepare

NUM_BLOCKS = 1000
SMALL = StepShape(max_num_seqs=40, max_num_batched_tokens=300, max_model_len=50, block_size=4)

torch.set_num_threads(1)


def check(plain: Prepared, kernels: Prepared, bucket: tuple[int, int], random: Random) -> None:
    append = partial(triton_prepare.append, kernels.tables, kernels.step)
    fill = partial(triton_prepare.fill, kernels.prepare.batch(*bucket), kernels.tables, kernels.step)
    check_same(plain, kernels, append, fill, bucket, random)


@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize(
    ("max_num_seqs", "max_num_tokens", "max_count"),
    [
        (1, 1, 1),
        (1, 700, 700),
        (2, 2, 1),
        (5, 40, 6),
        (33, 700, 90),
        (100, 300, 12),
        (300, 300, 1),
        (300, 700, 5),
        (600, 900, 2),
    ],
)
def test_kernels_write_what_the_torch_code_writes(
    max_num_seqs: int, max_num_tokens: int, max_count: int, block_size: int
) -> None:
    shape = StepShape(max_num_seqs, max_num_tokens, max_model_len=5 * max_count + 2, block_size=block_size)
    random, reference = Random(max_num_seqs), Reference(shape, NUM_BLOCKS)
    plain, kernels = Prepared(shape, NUM_BLOCKS), Prepared(shape, NUM_BLOCKS)
    for k in range(4):
        garbage(plain.record, random)
        admitted = random.sample(range(max_num_seqs), random.randint(0, shape.max_admissions))
        sequences = fill_step(
            plain.step,
            random,
            reference,
            admitted,
            num_seqs=max_num_seqs if k < 2 else None,
            max_count=max_count,
        )
        num_seqs, num_tokens = len(sequences), sum(count for _, count in sequences)
        if k % 2:
            num_seqs = random.randint(num_seqs, max_num_seqs)
            num_tokens = random.randint(max(num_seqs, num_tokens), max_num_tokens)
        check(plain, kernels, (num_seqs, num_tokens), random)
        for tables in (reference, plain, kernels):
            tables.finish(sequences)


@pytest.mark.parametrize("bucket", [(1, 1), (2, 2), (40, 40), (1, 300), (40, 300)], ids=str)
def test_a_record_of_zeros_is_all_padding(bucket: tuple[int, int]) -> None:
    check(Prepared(SMALL, NUM_BLOCKS), Prepared(SMALL, NUM_BLOCKS), bucket, Random(1))


def test_counts_of_zero_hide_whatever_the_record_holds() -> None:
    plain, kernels = Prepared(SMALL, NUM_BLOCKS), Prepared(SMALL, NUM_BLOCKS)
    garbage(plain.record, Random(1))
    for count in (plain.step.num_seqs, plain.step.num_appends, plain.step.num_admissions):
        count.zero_()
    check(plain, kernels, (40, 300), Random(2))
