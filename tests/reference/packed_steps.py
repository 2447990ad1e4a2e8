"""Drives a model runner by hand: random steps of prefill chunks mixed with decodes, padding and scattered blocks.

A minimal scheduler and executor on lists, so that tests of a runner need neither of the real ones.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ipc.records import StepShape
from workers.gpu.execution.step_batch import BatchBuffers, StepBatch


class Runner(Protocol):
    def logits(self, batch: StepBatch) -> torch.Tensor: ...


@dataclass
class PackedSequence:
    """A sequence on its way: its ids, how many of them have KV, and the blocks these lie in."""

    row: int
    token_ids: list[int]
    num_prompt_tokens: int
    blocks: list[int]
    num_computed_tokens: int = 0
    logits: list[torch.Tensor] = field(default_factory=list)  # [vocab_size] of each generated token

    @property
    def generated(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]


def make_batch(
    scheduled: Sequence[tuple[PackedSequence, int]],
    block_table: torch.Tensor,
    block_size: int,
    *,
    num_padding_tokens: int = 0,
    num_padding_seqs: int = 0,
) -> StepBatch:
    """The batch of a step that computes the given number of tokens of each sequence, padding at its end."""
    trash_row, trash_block = block_table.shape[0] - 1, int(block_table[-1, 0])
    input_ids: list[int] = []
    positions: list[int] = []
    slot_mapping: list[int] = []
    cu_seqlens = [0]
    for sequence, num_tokens in scheduled:
        for position in range(sequence.num_computed_tokens, sequence.num_computed_tokens + num_tokens):
            input_ids.append(sequence.token_ids[position])
            positions.append(position)
            block = int(block_table[sequence.row, position // block_size])
            slot_mapping.append(block * block_size + position % block_size)
        cu_seqlens.append(len(input_ids))
    last_tokens = [end - 1 for end in cu_seqlens[1:]]
    seq_lens = [sequence.num_computed_tokens + num_tokens for sequence, num_tokens in scheduled]
    padding_slots = [trash_block * block_size + i % block_size for i in range(num_padding_tokens)]
    num_seqs, num_tokens = len(scheduled) + num_padding_seqs, len(input_ids) + num_padding_tokens
    shape = StepShape(num_seqs, num_tokens, block_table.shape[1] * block_size, block_size)
    # Like the executor's: views of one buffer, for which compiled layers have a graph.
    buffers = BatchBuffers(shape, lambda size: torch.zeros(size, dtype=torch.uint8), block_table, {})
    batch = buffers.batch(num_seqs, num_tokens)
    for tensor, values in (
        (batch.input_ids, input_ids + [0] * num_padding_tokens),
        (batch.positions, positions + [0] * num_padding_tokens),
        (batch.slot_mapping, slot_mapping + padding_slots),
        (batch.cu_seqlens, cu_seqlens + [cu_seqlens[-1]] * num_padding_seqs),
        (batch.seq_lens, seq_lens + [0] * num_padding_seqs),
        (batch.seq_row, [s.row for s, _ in scheduled] + [trash_row] * num_padding_seqs),
        (batch.logits_index, last_tokens + [0] * num_padding_seqs),
    ):
        tensor.copy_(torch.tensor(values))
    return batch


def run_packed(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    num_blocks: int,
    block_size: int = 4,
    max_chunk: int = 7,
    seed: int = 0,
) -> list[PackedSequence]:
    """Generate greedily, `max_new_tokens` for each prompt, by steps drawn from `seed`.

    Every step takes a random share of the unfinished sequences, in random order; a sequence with more than one token
    to compute gets a chunk of random length. Blocks are handed out in random order. Raises AssertionError if a logit
    is not finite, padding included.
    """
    rng = random.Random(seed)
    max_len = max(len(prompt) for prompt in prompts) + max_new_tokens
    blocks_per_seq = -(-max_len // block_size)
    free = rng.sample(range(num_blocks), len(prompts) * blocks_per_seq)
    block_table = torch.full((len(prompts) + 1, blocks_per_seq), num_blocks, dtype=torch.int32)
    rows = rng.sample(range(len(prompts)), len(prompts))
    sequences = []
    for row, prompt in zip(rows, prompts, strict=True):
        blocks = [free.pop() for _ in range(-(-(len(prompt) + max_new_tokens) // block_size))]
        block_table[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        sequences.append(PackedSequence(row, list(prompt), len(prompt), blocks))

    while unfinished := [s for s in sequences if len(s.generated) < max_new_tokens]:
        chosen = rng.sample(unfinished, rng.randint(1, len(unfinished)))
        scheduled = []
        for sequence in chosen:
            num_left = len(sequence.token_ids) - sequence.num_computed_tokens
            scheduled.append((sequence, rng.randint(1, min(num_left, max_chunk))))
        batch = make_batch(
            scheduled,
            block_table,
            block_size,
            num_padding_tokens=rng.choice((0, 0, 1, 5)),
            num_padding_seqs=rng.choice((0, 0, 1, 3)),
        )
        logits = runner.logits(batch)
        assert logits.shape[0] == batch.num_seqs, f"{logits.shape[0]} rows of logits for {batch.num_seqs} sequences"
        assert logits.amax(-1).isfinite().all(), "a row of logits is not finite"
        for row_logits, (sequence, num_tokens) in zip(logits, scheduled, strict=False):
            sequence.num_computed_tokens += num_tokens
            if sequence.num_computed_tokens == len(sequence.token_ids):
                sequence.logits.append(row_logits)
                sequence.token_ids.append(int(row_logits.argmax()))
    return sequences
