"""Compares BatchBuilder with a slow reading of the same record in plain Python, with padding and without."""

from __future__ import annotations

from random import Random

import torch

from ipc.records import MAX_END_IDS, StepShape
from tests.reference.step_records import Prepared, Reference, fill_step, garbage

SHAPE = StepShape(max_num_seqs=6, max_num_batched_tokens=40, max_model_len=32, block_size=4)
NUM_BLOCKS = 48

torch.set_num_threads(1)


def test_batches_say_what_the_records_say_with_and_without_padding() -> None:
    random = Random(1)
    for run in range(12):
        prepared = Prepared(SHAPE, NUM_BLOCKS, seed=run)
        prepare = prepared.prepare
        reference = Reference(SHAPE, NUM_BLOCKS)
        reference.ids = prepared.tables.token_ids.tolist()
        for k in range(12):
            garbage(prepared.record, random)
            admitted = list(range(SHAPE.max_num_seqs)) if k == 0 else random.sample(range(SHAPE.max_num_seqs), 2)
            sequences = fill_step(prepared.step, random, reference, admitted)
            if not sequences:
                continue
            num_tokens = sum(count for _, count in sequences)
            pad = run % 2 == 1
            batch = prepare.batch(
                SHAPE.max_num_seqs if pad else len(sequences), SHAPE.max_num_batched_tokens if pad else num_tokens
            )
            prepare.admit()
            prepare.append()
            prepare.filler(batch)()
            reference.check(batch, sequences)
            reference.finish(sequences)
            prepared.finish(sequences)


def test_an_admission_sets_every_column_of_its_row_and_no_other_row() -> None:
    prepared = Prepared(SHAPE, NUM_BLOCKS)
    tables = prepared.tables
    max_len, end_ids = tables.max_len.clone(), tables.end_ids.clone()
    garbage(prepared.record, Random(3))
    fill_step(prepared.step, Random(4), Reference(SHAPE, NUM_BLOCKS), [3, 1])
    prepared.prepare.admit()
    for row in (1, 3):
        assert int(tables.max_len[row]) == 9 + row
        assert float(tables.temperature[row]) == row / 2
        assert int(tables.top_k[row]) == row
        assert abs(float(tables.top_p[row]) - 1 / (row + 1)) < 1e-6
        assert float(tables.min_p[row]) == row / 8
        assert int(tables.seed[row]) == 2**60 + row
        assert tables.end_ids[row].tolist() == list(range(row, row + MAX_END_IDS))
    for row in (0, 2, 4, 5):
        assert torch.equal(tables.end_ids[row], end_ids[row])
        assert tables.max_len[row] == max_len[row]
