"""Prepare against a slow reading of the same record, in plain Python, with padding and without."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import torch

from ipc.records import MAX_END_IDS, StepShape, step_layout
from workers.gpu.batch import StepBatch
from workers.gpu.device.cpu import CpuDevice
from workers.gpu.prepare import Prepare
from workers.gpu.records import views
from workers.gpu.tables import RowTables

SHAPE = StepShape(max_num_seqs=6, max_num_batched_tokens=40, max_model_len=32, block_size=4)
NUM_BLOCKS = 48
NUM_ROWS = SHAPE.max_num_seqs + 1

torch.set_num_threads(1)


class Reference:
    """The row tables as lists, and what a step reads from them."""

    def __init__(self) -> None:
        self.computed = [0] * NUM_ROWS
        self.ids = [[0] * SHAPE.max_model_len for _ in range(NUM_ROWS)]
        self.blocks = [[NUM_BLOCKS] * SHAPE.max_blocks_per_seq for _ in range(NUM_ROWS)]

    def check(self, batch: StepBatch, sequences: list[tuple[int, int]]) -> None:
        """`sequences` are (row, tokens); everything beyond them must be padding."""
        tokens = [(row, self.computed[row] + i) for row, count in sequences for i in range(count)]
        num_pads, num_pad_seqs = batch.num_tokens - len(tokens), batch.num_seqs - len(sequences)
        trash_slot = NUM_BLOCKS * SHAPE.block_size
        ends = np.cumsum([count for _, count in sequences]).tolist()
        assert batch.positions.tolist() == [position for _, position in tokens] + [0] * num_pads
        assert batch.input_ids.tolist() == [self.ids[row][position] for row, position in tokens] + [0] * num_pads
        assert (
            batch.slot_mapping.tolist()
            == [
                self.blocks[row][position // SHAPE.block_size] * SHAPE.block_size + position % SHAPE.block_size
                for row, position in tokens
            ]
            + [trash_slot] * num_pads
        )
        assert batch.cu_seqlens.tolist() == [0, *ends, *[ends[-1]] * num_pad_seqs]
        assert batch.logits_index.tolist() == [end - 1 for end in ends] + [0] * num_pad_seqs
        assert batch.seq_row.tolist() == [row for row, _ in sequences] + [SHAPE.max_num_seqs] * num_pad_seqs
        assert batch.seq_lens.tolist() == [self.computed[row] + n for row, n in sequences] + [0] * num_pad_seqs
        assert batch.block_table.tolist() == self.blocks


def garbage(record: torch.Tensor, random: Random) -> None:
    """What a ring record may hold beyond its counts: leftovers of anything."""
    record.copy_(torch.tensor([random.randrange(256) for _ in range(record.numel())], dtype=torch.uint8))


def fill_step(step: Any, random: Random, reference: Reference, admitted: list[int]) -> list[tuple[int, int]]:
    """A random step that (re)admits some rows; writes it, applies it to the reference, and returns its sequences."""
    step.num_admissions[0] = len(admitted)
    for i, row in enumerate(admitted):
        step.admit_row[i] = row
        step.admit_num_computed[i] = 0
        for name, value in (("max_len", 9 + row), ("temperature", row / 2), ("top_k", row), ("top_p", 1 / (row + 1)),
                            ("min_p", row / 8), ("seed", 2**60 + row)):  # fmt: skip
            getattr(step, f"admit_{name}")[i] = value
        step.admit_end_ids[i] = torch.arange(MAX_END_IDS) + row
        reference.computed[row] = 0
        reference.blocks[row] = [NUM_BLOCKS] * SHAPE.max_blocks_per_seq
    rows = random.sample(range(SHAPE.max_num_seqs), random.randint(1, SHAPE.max_num_seqs))
    sequences: list[tuple[int, int]] = []
    num_appends = 0
    for row in rows:
        room = min(6, SHAPE.max_model_len - reference.computed[row])
        if room < 1:
            continue
        count = random.randint(1, room)
        held = sum(block != NUM_BLOCKS for block in reference.blocks[row])
        for index in range(held, -(-(reference.computed[row] + count) // SHAPE.block_size)):
            block = random.randrange(NUM_BLOCKS)
            reference.blocks[row][index] = block
            step.append_row[num_appends], step.append_index[num_appends] = row, index
            step.append_block[num_appends] = block
            num_appends += 1
        step.seq_row[len(sequences)], step.seq_num_tokens[len(sequences)] = row, count
        sequences.append((row, count))
    step.num_seqs[0], step.num_tokens[0] = len(sequences), sum(count for _, count in sequences)
    step.num_appends[0] = num_appends
    return sequences


def test_batches_say_what_the_records_say_with_and_without_padding() -> None:
    random = Random(1)
    for run in range(12):
        device = CpuDevice()
        tables = RowTables(device, SHAPE, NUM_BLOCKS)
        tables.token_ids.copy_(torch.tensor(np.random.default_rng(run).integers(1, 999, tables.token_ids.shape)))
        layout = step_layout(SHAPE)
        record = torch.zeros(layout.num_bytes, dtype=torch.uint8)
        step = views(layout, record)
        prepare = Prepare(device, tables, step)
        reference = Reference()
        reference.ids = tables.token_ids.tolist()
        for k in range(12):
            garbage(record, random)
            admitted = list(range(SHAPE.max_num_seqs)) if k == 0 else random.sample(range(SHAPE.max_num_seqs), 2)
            sequences = fill_step(step, random, reference, admitted)
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
            for row, count in sequences:  # as the sampler does
                reference.computed[row] += count
                tables.num_computed_tokens[row] = reference.computed[row]


def test_an_admission_sets_every_column_of_its_row_and_no_other_row() -> None:
    device = CpuDevice()
    tables = RowTables(device, SHAPE, NUM_BLOCKS)
    layout = step_layout(SHAPE)
    record = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    step = views(layout, record)
    prepare = Prepare(device, tables, step)
    garbage(record, Random(3))
    fill_step(step, Random(4), Reference(), [3, 1])
    prepare.admit()
    for row in (1, 3):
        assert int(tables.max_len[row]) == 9 + row
        assert float(tables.temperature[row]) == row / 2
        assert int(tables.top_k[row]) == row
        assert abs(float(tables.top_p[row]) - 1 / (row + 1)) < 1e-6
        assert float(tables.min_p[row]) == row / 8
        assert int(tables.seed[row]) == 2**60 + row
        assert tables.end_ids[row].tolist() == list(range(row, row + MAX_END_IDS))
    for row in (0, 2, 4, 5):
        assert not tables.end_ids[row].any()
        assert int(tables.max_len[row]) == 0
