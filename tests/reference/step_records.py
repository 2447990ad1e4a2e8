"""Random step records, what BatchBuilder must make of them in plain Python, and the tables and buffers it works on."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import torch

from ipc.record_layout import field_names
from ipc.records import MAX_END_IDS, AdmittedColumns, StepShape, step_layout
from workers.gpu.device.base import Device
from workers.gpu.device.cpu import CpuDevice
from workers.gpu.execution.batch_builder import BatchBuilder
from workers.gpu.execution.row_tables import RowTables
from workers.gpu.execution.step_batch import StepBatch
from workers.gpu.execution.tensor_views import StepTensors, tensor_views

Sequences = list[tuple[int, int]]  # (row, tokens in the step)


class Prepared:
    """A record on a device, row tables with random ids, and BatchBuilder for both: the same again for the same seed."""

    def __init__(self, shape: StepShape, num_blocks: int, *, device: Device[Any, Any] | None = None, seed: int = 0):
        device = CpuDevice() if device is None else device
        layout = step_layout(shape)
        self.tables = RowTables(device, shape, num_blocks, vocab_size=64)
        ids = np.random.default_rng(seed).integers(1, 999, self.tables.token_ids.shape)
        self.tables.token_ids.copy_(torch.tensor(ids))
        self.record = device.zeros("record", (layout.num_bytes,), torch.uint8)
        self.step = tensor_views(StepTensors, layout, self.record)
        self.prepare = BatchBuilder(device, self.tables, self.step)

    def settle_trash_row(self) -> None:
        """All that an admission leaves behind goes to the trash row, and on CUDA any of it may be the last."""
        for column in field_names(AdmittedColumns):
            getattr(self.tables, column)[self.tables.trash_row] = 7

    def finish(self, sequences: Sequences) -> None:
        """Move the rows on, as the sampler does."""
        table = torch.tensor(sequences, dtype=torch.int32, device=self.record.device).reshape(-1, 2)
        self.tables.num_computed_tokens.index_add_(0, table[:, 0], table[:, 1])


class Reference:
    """The row tables as lists, and what a step reads from them."""

    def __init__(self, shape: StepShape, num_blocks: int) -> None:
        num_rows = shape.max_num_seqs + 1
        self.shape, self.num_blocks = shape, num_blocks
        self.computed = [0] * num_rows
        self.ids = [[0] * shape.max_model_len for _ in range(num_rows)]
        self.blocks = [[num_blocks] * shape.max_blocks_per_seq for _ in range(num_rows)]

    def finish(self, sequences: Sequences) -> None:
        """Move the rows on, as the sampler does."""
        for row, count in sequences:
            self.computed[row] += count

    def check(self, batch: StepBatch, sequences: Sequences) -> None:
        """Everything beyond the sequences must be padding."""
        block_size = self.shape.block_size
        tokens = [(row, self.computed[row] + i) for row, count in sequences for i in range(count)]
        num_pads, num_pad_seqs = batch.num_tokens - len(tokens), batch.num_seqs - len(sequences)
        trash_slot = self.num_blocks * block_size
        ends = np.cumsum([count for _, count in sequences]).tolist()
        assert batch.positions.tolist() == [position for _, position in tokens] + [0] * num_pads
        assert batch.input_ids.tolist() == [self.ids[row][position] for row, position in tokens] + [0] * num_pads
        assert (
            batch.slot_mapping.tolist()
            == [
                self.blocks[row][position // block_size] * block_size + position % block_size
                for row, position in tokens
            ]
            + [trash_slot] * num_pads
        )
        assert batch.cu_seqlens.tolist() == [0, *ends, *[ends[-1]] * num_pad_seqs]
        assert batch.logits_index.tolist() == [end - 1 for end in ends] + [0] * num_pad_seqs
        assert batch.seq_row.tolist() == [row for row, _ in sequences] + [self.shape.max_num_seqs] * num_pad_seqs
        assert batch.seq_lens.tolist() == [self.computed[row] + n for row, n in sequences] + [0] * num_pad_seqs
        assert batch.block_table.tolist() == self.blocks


def garbage(memory: torch.Tensor, random: Random) -> None:
    """Arbitrary leftovers, which a ring record may hold beyond its counts. `memory` is [n] uint8."""
    memory.copy_(torch.frombuffer(bytearray(random.randbytes(memory.numel())), dtype=torch.uint8))


def fill_step(
    step: StepTensors,
    random: Random,
    reference: Reference,
    admitted: list[int],
    *,
    num_seqs: int | None = None,
    max_count: int = 6,
) -> Sequences:
    """A random step that (re)admits some rows; writes it, applies it to the reference, and returns its sequences.

    They are of `num_seqs` rows, None = of any number, less those that are full, and of up to `max_count` tokens each.
    """
    shape, num_blocks = reference.shape, reference.num_blocks
    step.num_admissions[0] = len(admitted)
    for i, row in enumerate(admitted):
        step.admit.row[i] = row
        step.admit.num_computed_tokens[i] = 0
        for name, value in (("max_len", 9 + row), ("temperature", row / 2), ("top_k", row), ("top_p", 1 / (row + 1)),
                            ("min_p", row / 8), ("seed", 2**60 + row)):  # fmt: skip
            getattr(step.admit, name)[i] = value
        step.admit.end_ids[i] = torch.arange(MAX_END_IDS) + row
        reference.computed[row] = 0
        reference.blocks[row] = [num_blocks] * shape.max_blocks_per_seq
    if num_seqs is None:
        num_seqs = random.randint(1, shape.max_num_seqs)
    sequences: Sequences = []
    num_tokens = num_appends = 0
    for row in random.sample(range(shape.max_num_seqs), num_seqs):
        room = min(max_count, shape.max_model_len - reference.computed[row], shape.max_num_batched_tokens - num_tokens)
        if room < 1:
            continue
        count = random.randint(1, room)
        held = sum(block != num_blocks for block in reference.blocks[row])
        for index in range(held, -(-(reference.computed[row] + count) // shape.block_size)):
            block = random.randrange(num_blocks)
            reference.blocks[row][index] = block
            step.append_row[num_appends], step.append_index[num_appends] = row, index
            step.append_block[num_appends] = block
            num_appends += 1
        step.seq_row[len(sequences)], step.seq_num_tokens[len(sequences)] = row, count
        sequences.append((row, count))
        num_tokens += count
    step.num_seqs[0], step.num_tokens[0], step.num_appends[0] = len(sequences), num_tokens, num_appends
    return sequences


def check_same(
    plain: Prepared,
    other: Prepared,
    append: Callable[[], None],
    fill: Callable[[], None],
    bucket: tuple[int, int],
    random: Random,
) -> None:
    """Lay out the record of `plain` in a bucket (S, T), and once more in `other` by `append` and `fill`.

    Both must write the same to every table and buffer, and nothing anywhere else in them. `other` may be on another
    device.
    """
    other.record.copy_(plain.record)
    buffers, batch = plain.prepare.buffers, plain.prepare.batch(*bucket)
    garbage(buffers, random)
    batch.cu_seqlens[0] = 0
    other.prepare.buffers.copy_(buffers)
    for prepared in (plain, other):
        prepared.prepare.admit()
        prepared.settle_trash_row()
    plain.prepare.append()
    append()
    plain.prepare.filler(batch)()
    fill()
    assert torch.equal(other.tables.columns.cpu(), plain.tables.columns)
    for name, expected in vars(batch).items():
        if isinstance(expected, torch.Tensor):
            assert torch.equal(getattr(other.prepare.batch(*bucket), name).cpu(), expected), name
    assert torch.equal(other.prepare.buffers.cpu(), buffers), "something was written outside of the batch"
