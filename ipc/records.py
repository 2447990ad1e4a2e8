"""The layouts of the three kinds of ring record: prompts, steps and results.

A step record says who runs and what changed; a result record what came of it, sequence by sequence in the step's own
order. Sizes follow from one `StepShape`, which the launcher derives from the configuration and hands to everyone.
"""

from __future__ import annotations

import enum
from typing import Final

import msgspec

from ipc.record_layout import Layout
from ipc.sampling_params import MAX_LOGPROBS, MAX_STOP_TOKEN_IDS

MAX_EOS_TOKEN_IDS: Final = 8  # of the model's configuration; unused places hold -1
# Ids that end a row: the model's, the tokenizer's eos token and the request's.
MAX_END_IDS: Final = MAX_EOS_TOKEN_IDS + 1 + MAX_STOP_TOKEN_IDS
PROMPT_RECORD_TOKENS: Final = 4096
MAX_ADMISSIONS: Final = 64  # in one step
NO_TOKEN: Final = -1


class StepShape(msgspec.Struct, frozen=True):
    """The bounds from which every record and device table is sized."""

    max_num_seqs: int  # rows, and sequences in one step
    max_num_batched_tokens: int  # tokens in one step
    max_model_len: int  # prompt + output tokens of one sequence
    block_size: int  # tokens per KV block

    @property
    def max_blocks_per_seq(self) -> int:
        return -(-self.max_model_len // self.block_size)

    @property
    def max_appends(self) -> int:
        """Block-table entries that one step can add: one per started block of its tokens, one more per sequence, and
        cached blocks for the admission of the longest sequence."""
        return self.max_num_seqs + -(-self.max_num_batched_tokens // self.block_size) + self.max_blocks_per_seq

    @property
    def max_admissions(self) -> int:
        return min(self.max_num_seqs, MAX_ADMISSIONS)


class SamplerVariant(enum.IntEnum):
    """Which sampler a step needs: the most demanding of its sequences decides."""

    GREEDY = 0
    PLAIN = 1  # some sequence has temperature > 0
    FILTERED = 2  # some sequence uses top_k, top_p or min_p


class FinishCode(enum.IntEnum):
    """What the sampler found out about a token that it wrote."""

    RUNNING = 0
    STOP = 1  # the token is one of the row's end ids
    LENGTH = 2  # the row is as long as it may get
    NOT_FINITE = 3  # no token: the row's logits hold NaN or +inf, or nothing but -inf


def prompt_layout() -> Layout:
    """Token ids of one prompt; a long one takes consecutive records. Its length travels with its tickets."""
    return Layout("prompt", [("token_ids", "<i4", (PROMPT_RECORD_TOKENS,))])


def step_layout(shape: StepShape) -> Layout:
    """Scheduler -> GPU process. Only the first `num_*` entries of each array mean anything.

    Admissions set a row's columns before the step runs: `admit_length` ids are copied from consecutive records of
    prompt ring `admit_ring`, from `admit_ticket`, to the row's start (0 = the row keeps its ids: a preempted sequence
    comes back), and `num_computed_tokens` is set to `admit_num_computed`. `admit_max_len` is the length, prompt and
    output, at which the row ends. Everything in front of `admit_row` is what a pure decode step needs.
    """
    seqs, appends, admits = shape.max_num_seqs, shape.max_appends, shape.max_admissions
    return Layout("step", [
        ("num_seqs", "<i4", (1,)),
        ("num_tokens", "<i4", (1,)),
        ("num_appends", "<i4", (1,)),
        ("num_admissions", "<i4", (1,)),
        ("variant", "<i4", (1,)),  # SamplerVariant
        ("want_logprobs", "<i4", (1,)),  # most top log-probabilities that a sequence of this step wants, + 1; 0 = none
        ("planned_at_ns", "<i8", (1,)),  # CLOCK_MONOTONIC
        ("seq_row", "<i4", (seqs,)),
        ("seq_num_tokens", "<i4", (seqs,)),  # tokens of this sequence to compute, >= 1
        ("seq_sample", "<i4", (seqs,)),  # 1 = sample a token after them
        ("append_row", "<i4", (appends,)),
        ("append_index", "<i4", (appends,)),
        ("append_block", "<i4", (appends,)),
        ("admit_row", "<i4", (admits,)),
        ("admit_ring", "<i4", (admits,)),
        ("admit_ticket", "<i8", (admits,)),
        ("admit_length", "<i4", (admits,)),
        ("admit_num_computed", "<i4", (admits,)),
        ("admit_max_len", "<i4", (admits,)),
        ("admit_temperature", "<f4", (admits,)),
        ("admit_top_k", "<i4", (admits,)),
        ("admit_top_p", "<f4", (admits,)),
        ("admit_min_p", "<f4", (admits,)),
        ("admit_seed", "<i8", (admits,)),
        ("admit_end_ids", "<i4", (admits, MAX_END_IDS)),
    ])  # fmt: skip


def result_layout(shape: StepShape) -> Layout:
    """GPU process -> scheduler, in the order of the step's sequences. `token_ids` is NO_TOKEN where none was sampled,
    which includes rows that finish as NOT_FINITE.

    `top_*` and `logprob` are filled only where the step's `want_logprobs` asked. Times are CLOCK_MONOTONIC.
    """
    seqs = shape.max_num_seqs
    return Layout("result", [
        ("token_ids", "<i4", (seqs,)),
        ("finish", "<i4", (seqs,)),  # FinishCode
        ("device_start_ns", "<i8", (1,)),
        ("device_end_ns", "<i8", (1,)),
        ("received_at_ns", "<i8", (1,)),  # when the GPU process took the step record
        ("logprob", "<f4", (seqs,)),
        ("top_ids", "<i4", (seqs, MAX_LOGPROBS)),
        ("top_logprobs", "<f4", (seqs, MAX_LOGPROBS)),
    ])  # fmt: skip
