"""A GPU process in plain Python that obeys step records exactly and checks them.

It keeps rows, block tables and KV as a device would. Each KV position also records its writer, its position, and a hash
of the prefix up to there. A sampled token is a hash of the prefix that the KV actually holds. So a block given to two
sequences, a row recycled early, or a position skipped or computed twice in the wrong place changes the tokens or
raises. Prompt ids are copied when a step is submitted, as a copy stream may do. They are compared with their records
again when the step runs. From the first moment to the second, the records must not change and the row must not have
another owner.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from ipc.records import NO_TOKEN, FinishCode, PromptRecord, ResultRecord, StepRecord, StepShape, step_layout
from ipc.ring import Ring
from ipc.sampling_params import MAX_LOGPROBS

VOCAB_SIZE = 61
_MODULUS = (1 << 61) - 1


def extend_hash(prefix: int, token_id: int) -> int:
    """The hash of a prefix and one more token; 1 is that of nothing."""
    return (prefix * 1_000_003 + token_id + 7) % _MODULUS


def sample_token(prefix: int, seed: int) -> int:
    """The token that follows a prefix with this hash."""
    return (prefix ^ (seed * 0x9E3779B97F4A7C15)) % _MODULUS % VOCAB_SIZE


def expected_tokens(prompt: Sequence[int], seed: int, max_len: int, end_ids: Sequence[int]) -> list[int]:
    """Return the tokens that a request must get, independent of other requests."""
    prefix = 1
    for token_id in prompt:
        prefix = extend_hash(prefix, token_id)
    tokens: list[int] = []
    while len(prompt) + len(tokens) < max_len:
        tokens.append(sample_token(prefix, seed))
        if tokens[-1] in end_ids:
            break
        prefix = extend_hash(prefix, tokens[-1])
    return tokens


class FakeGpu:
    """`submit` takes a published step record, `run_next` executes the oldest one submitted into a result record."""

    def __init__(self, shape: StepShape, num_blocks: int, prompt_rings: Sequence[Ring[PromptRecord]]) -> None:
        rows, num_slots = shape.max_num_seqs, num_blocks * shape.block_size
        self.shape = shape
        self.num_blocks = num_blocks
        self.prompt_rings = prompt_rings
        self.record_tokens = int(prompt_rings[0].layout.fields["token_ids"].shape[0])
        self.token_ids = np.full((rows, shape.max_model_len), NO_TOKEN, np.int64)
        self.num_computed = np.zeros(rows, np.int64)
        self.max_len = np.zeros(rows, np.int64)
        self.is_finite = np.ones(rows, bool)
        self.seed = [0] * rows
        self.end_ids: list[set[int]] = [set() for _ in range(rows)]
        self.block_table = np.full((rows, shape.max_blocks_per_seq), -1, np.int64)
        self.owner = np.zeros(rows, np.int64)  # counts admissions; each must write its whole KV again
        self.kv_owner = np.zeros(num_slots, np.int64)
        self.kv_position = np.full(num_slots, -1, np.int64)
        self.kv_prefix = [0] * num_slots
        self.overflowing: set[int] = set()  # token ids with non-finite KV; so are the logits that read it
        self.kv_is_finite = np.ones(num_slots, bool)
        self.clock_ns = 1_000
        self.step_ns = 100
        self.shared: list[list[int]] = [[] for _ in range(rows)]  # by row: prefix hashes of what it found cached
        self._num_owners = 0
        self._layout = step_layout(shape)
        self._submitted: deque[StepRecord] = deque()

    @property
    def num_submitted(self) -> int:
        """Steps that have not run yet."""
        return len(self._submitted)

    def submit(self, record: StepRecord) -> None:
        """Take a copy of the record, and of the prompts that it admits."""
        copy = self._layout.views(memoryview(bytearray(self._layout.num_bytes)))
        for field in self._layout.fields.values():
            field.of(copy)[:] = field.of(record)
        for i in range(int(copy.num_admissions[0])):
            length, row = int(copy.admit.length[i]), int(copy.admit.row[i])
            self.token_ids[row, :length] = self._prompt(copy, i)
        self._submitted.append(copy)

    def run_next(self, result: ResultRecord) -> None:
        """Execute the oldest submitted step."""
        step = self._submitted.popleft()
        n, num_tokens, num_appends = int(step.num_seqs[0]), int(step.num_tokens[0]), int(step.num_appends[0])
        rows = step.seq_row[:n].tolist()
        counts = step.seq_num_tokens[:n].tolist()
        assert 1 <= n == len(set(rows)), "a row runs twice in a step, or none does"
        assert min(counts) >= 1
        assert sum(counts) == num_tokens <= self.shape.max_num_batched_tokens, "a step over its budget"
        for i in range(int(step.num_admissions[0])):
            assert int(step.admit.row[i]) in rows, "a row is admitted without running"
            self._admit(step, i)
        for i in range(num_appends):
            self._append(int(step.append_row[i]), int(step.append_index[i]), int(step.append_block[i]))
        result.received_at_ns[0] = step.planned_at_ns[0]  # at once
        result.device_start_ns[0] = self.clock_ns
        self._score_prompts(step, rows, counts, result)
        for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
            result.token_ids[i], result.finish[i] = NO_TOKEN, FinishCode.RUNNING
            prefix = self._compute(row, count)
            if step.seq_sample[i]:
                result.token_ids[i], result.finish[i] = self._sample(row, prefix)
            result.logprob[i] = -float(row)
            result.top_ids[i] = np.arange(result.top_ids.shape[1]) + row
            result.top_logprobs[i] = -np.arange(result.top_ids.shape[1]) - row
            result.extra_logprobs[i] = -100 * (row + 1) - np.arange(result.extra_logprobs.shape[1])
        self.clock_ns += self.step_ns
        result.device_end_ns[0] = self.clock_ns

    def _score_prompts(self, step: StepRecord, rows: list[int], counts: list[int], result: ResultRecord) -> None:
        """The log-probability of the token at position p is -p - token / 64; the likeliest tokens are p, p + 1, ..."""
        tokens = [(row, self.num_computed[row] + i) for row, n in zip(rows, counts, strict=True) for i in range(n)]
        places = step.prompt_logprob_index[: int(step.num_prompt_logprobs[0])].tolist()
        assert len(set(places)) == len(places), "a position is asked for twice"
        for i, (row, before) in enumerate(tokens[place] for place in places):
            position = int(before) + 1
            result.prompt_logprob[i] = -position - self.token_ids[row, position] / 64
            result.prompt_top_ids[i] = position + np.arange(MAX_LOGPROBS)
            result.prompt_top_logprobs[i] = -position - np.arange(MAX_LOGPROBS)

    def _prompt(self, step: StepRecord, i: int) -> np.ndarray[Any, Any]:
        length, ticket = int(step.admit.length[i]), int(step.admit.ticket[i])
        ring = self.prompt_rings[int(step.admit.ring[i])]
        num_records = -(-length // self.record_tokens)
        parts = [ring.record(ticket + k).token_ids for k in range(num_records)]
        return np.concatenate([np.empty(0, np.int32), *parts])[:length]

    def _admit(self, step: StepRecord, i: int) -> None:
        row, length = int(step.admit.row[i]), int(step.admit.length[i])
        assert (self.token_ids[row, :length] == self._prompt(step, i)).all(), "prompt ids changed before the step ran"
        self._num_owners += 1
        self.owner[row] = self._num_owners
        self.num_computed[row] = step.admit.num_computed_tokens[i]
        self.max_len[row] = step.admit.max_len[i]
        self.seed[row] = int(step.admit.seed[i])
        self.end_ids[row] = set(step.admit.end_ids[i].tolist()) - {NO_TOKEN}
        self.block_table[row] = -1
        prefix, self.shared[row] = 1, []
        for token_id in self.token_ids[row, : self.num_computed[row]].tolist():
            prefix = extend_hash(prefix, token_id)
            self.shared[row].append(prefix)

    def _append(self, row: int, index: int, block: int) -> None:
        assert 0 <= block < self.num_blocks, f"block {block} is not there"
        assert self.block_table[row, index] == -1, f"row {row} has a block {index} already"
        assert index == 0 or self.block_table[row, index - 1] >= 0, f"row {row} has no block {index - 1}"
        self.block_table[row, index] = block

    def _compute(self, row: int, count: int) -> int:
        """Write KV of `count` tokens; returns the hash of the prefix up to the last of them."""
        size, first = self.shape.block_size, int(self.num_computed[row])
        end = first + count
        assert end <= self.max_len[row], f"row {row} is computed past its length"
        positions = np.arange(end)
        blocks = self.block_table[row, positions // size]
        assert (blocks >= 0).all(), f"row {row} lacks a block for {end} tokens"
        kv_slots = blocks * size + positions % size
        old = kv_slots[:first]
        shared = self.shared[row]
        own = old[len(shared) :]
        assert (self.kv_owner[own] == self.owner[row]).all(), f"row {row} reads KV of another sequence"
        found = [self.kv_prefix[kv_slot] for kv_slot in old[: len(shared)].tolist()]
        assert found == shared, f"row {row} reads cached KV of other tokens"
        assert (self.kv_position[old] == positions[:first]).all(), f"row {row} reads KV of other positions"
        prefix = self.kv_prefix[kv_slots[first - 1]] if first else 1
        for kv_slot, token_id in zip(kv_slots[first:].tolist(), self.token_ids[row, first:end].tolist(), strict=True):
            prefix = extend_hash(prefix, token_id)
            self.kv_prefix[kv_slot] = prefix
        self.kv_owner[kv_slots[first:]] = self.owner[row]
        self.kv_position[kv_slots[first:]] = positions[first:]
        self.num_computed[row] = end
        self.kv_is_finite[kv_slots[first:]] = [
            token_id not in self.overflowing for token_id in self.token_ids[row, first:end].tolist()
        ]
        self.is_finite[row] = self.kv_is_finite[kv_slots].all()
        return prefix

    def _sample(self, row: int, prefix: int) -> tuple[int, int]:
        position = int(self.num_computed[row])
        assert position < self.max_len[row], f"row {row} samples a token past its length"
        token_id = sample_token(prefix, self.seed[row])
        self.token_ids[row, position] = token_id
        if not self.is_finite[row]:
            return NO_TOKEN, FinishCode.NOT_FINITE
        if token_id in self.end_ids[row]:
            return token_id, FinishCode.STOP
        return token_id, FinishCode.LENGTH if position + 1 == self.max_len[row] else FinishCode.RUNNING
