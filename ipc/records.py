"""The three kinds of ring record: prompts, steps and results. They are the interface of scheduler and GPU process.

A step record says which sequences run and what changes for their rows. A result record says what became of each
sequence, in the step's own order. Sizes follow from one `StepShape`, which the launcher derives from the configuration
and gives to every process. Each record class is generic in its arrays: numpy on the host, tensors on the device.
"""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass
from typing import Annotated, Final, Generic

import msgspec

from ipc.record_layout import Array, Each, HostArray, Layout, declared_fields, float32, int32, int64
from ipc.sampling_params import MAX_LOGPROB_TOKEN_IDS, MAX_LOGPROBS, MAX_STOP_TOKEN_IDS, SamplingParams

MAX_EOS_TOKEN_IDS: Final = 8  # of the model's configuration; unused places hold -1
# Ids that end a row: the model's, the tokenizer's eos token and the request's.
MAX_END_IDS: Final = MAX_EOS_TOKEN_IDS + 1 + MAX_STOP_TOKEN_IDS
PROMPT_RECORD_TOKENS: Final = 4096
UPLOAD_RING: Final = 0  # the prompt ring that the scheduler writes
MAX_ADMISSIONS: Final = 64  # in one step
MAX_PROMPT_LOGPROBS: Final = 512  # positions of prompts in one step
NO_TOKEN: Final = -1


class StepShape(msgspec.Struct, frozen=True):
    """The bounds from which every record and device table is sized."""

    max_num_seqs: int  # rows, and sequences in one step
    max_num_batched_tokens: int  # tokens in one step
    max_model_len: int  # prompt + output tokens of one sequence
    block_size: int  # tokens per KV block
    vocab_size: int = 0  # width of the logits; 0 = no request has masks
    num_grammar_workers: int = 0

    @property
    def mask_words(self) -> int:
        """int32 words of a mask with one bit for each token: token t is bit t % 32 of word t // 32; 1 = allowed."""
        return max(1, -(-self.vocab_size // 32))

    @property
    def num_mask_rings(self) -> int:
        return max(1, self.num_grammar_workers)

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

    @property
    def max_prompt_logprobs(self) -> int:
        """Tokens that one step can compute of prompts whose log-probabilities are wanted."""
        return min(self.max_num_batched_tokens, MAX_PROMPT_LOGPROBS)


class SamplerVariant(enum.IntEnum):
    """Which sampler a step needs: the most demanding of its sequences decides."""

    GREEDY = 0
    PLAIN = 1  # some sequence has temperature > 0
    FILTERED = 2  # some sequence uses top_k, top_p or min_p
    ADJUSTED = 3  # some sequence's logits are adjusted first: penalties, bias, masks

    @classmethod
    def of(cls, params: SamplingParams) -> SamplerVariant:
        """The least sampler that serves these parameters, from what their columns need."""
        variant = cls.GREEDY
        for name, default, needs in _needs():
            if getattr(params, name) != default and (params.temperature > 0 or needs.also_greedy):
                variant = max(variant, needs.variant)
        return cls.ADJUSTED if params.structured_outputs is not None else variant


class FinishCode(enum.IntEnum):
    """What the sampler found out about a token that it wrote."""

    RUNNING = 0
    STOP = 1  # the token is one of the row's end ids
    LENGTH = 2  # the row is as long as it may get
    NOT_FINITE = 3  # no token: the row's logits hold NaN or +inf, or only -inf
    EXCLUDED = 4  # no token: the adjustments exclude every token


@dataclass(frozen=True)
class Fill:
    """Marks the value of a row's column before the row's first admission: it filters nothing and ends nothing.

    A string names an attribute of the bounds. An unmarked column holds 0.
    """

    value: float | str


@dataclass(frozen=True)
class Needs:
    """Marks a column whose parameter asks for a sampler if its value is not the column's Fill."""

    variant: SamplerVariant
    also_greedy: bool = False  # True: it changes the likeliest token too


class AdmittedColumns(Generic[Array]):
    """What an admission sets for a row. The one declaration of these columns.

    From it derive the fields of a step record's admissions, the device tables, what `BatchBuilder.admit` copies and the
    bytes that the memory account reserves. A column named as a field of SamplingParams gets that field's value
    (`Sequence.write_admission`).
    """

    num_computed_tokens: Annotated[Array, int32()]
    """Tokens of the row whose keys and values are in its blocks. The sampler moves it on after each step."""
    max_len: Annotated[Array, int32(), Fill("max_model_len")]
    """Tokens, prompt and output, at which the row ends."""
    prompt_len: Annotated[Array, int32()]
    """Tokens of the prompt. The row's ids from there on are output."""
    temperature: Annotated[Array, float32(), Needs(SamplerVariant.PLAIN)]
    """The divisor of the logits; 0 = greedy."""
    top_k: Annotated[Array, int32(), Needs(SamplerVariant.FILTERED)]
    """How many of the likeliest tokens are kept; 0 = all."""
    top_p: Annotated[Array, float32(), Fill(1.0), Needs(SamplerVariant.FILTERED)]
    """The probability that the kept tokens must reach; 1 = all tokens are kept."""
    min_p: Annotated[Array, float32(), Needs(SamplerVariant.FILTERED)]
    """The least probability of a kept token, as a share of the likeliest token's; 0 = all tokens are kept."""
    repetition_penalty: Annotated[Array, float32(), Fill(1.0), Needs(SamplerVariant.ADJUSTED, also_greedy=True)]
    """Divides positive and multiplies negative logits of tokens among the row's ids; 1 = off."""
    presence_penalty: Annotated[Array, float32(), Needs(SamplerVariant.ADJUSTED, also_greedy=True)]
    """Is subtracted from the logits of tokens of the output."""
    frequency_penalty: Annotated[Array, float32(), Needs(SamplerVariant.ADJUSTED, also_greedy=True)]
    """Is subtracted once for each time that a token occurs in the output."""
    min_tokens: Annotated[Array, int32(), Needs(SamplerVariant.ADJUSTED, also_greedy=True)]
    """Tokens of output before the row may end by one of its end ids."""
    think_budget: Annotated[Array, int32(), Fill(-1.0)]
    """Tokens of thinking before `think_end` is sampled; -1 = no limit."""
    think_start: Annotated[Array, int32(), Fill(NO_TOKEN)]
    """The token that begins thinking."""
    think_end: Annotated[Array, int32(), Fill(NO_TOKEN)]
    """The token that ends thinking."""
    long_columns: Annotated[Array, int32()]
    """Bit i: column i of LongColumns (`ipc/long_values.py`) holds values of this row."""
    processed_logprobs: Annotated[Array, int32()]
    """1 = log-probabilities are of the logits as they are sampled, not of the model's own."""
    seed: Annotated[Array, int64()]
    """The key of the row's random numbers, together with the position."""
    end_ids: Annotated[Array, int32(MAX_END_IDS), Fill(NO_TOKEN)]
    """Token ids that end the row; unused places hold NO_TOKEN."""


class Admissions(AdmittedColumns[Array]):
    """The rows that a step admits, and what it sets for them before it runs."""

    row: Annotated[Array, int32()]
    """The admitted row."""
    ring: Annotated[Array, int32()]
    """The prompt ring that holds its token ids; 0 = the scheduler's own."""
    ticket: Annotated[Array, int64()]
    """The first of the consecutive records of that ring that hold the ids."""
    length: Annotated[Array, int32()]
    """How many ids are copied to the row's start; 0 = the row keeps its ids, because a preempted sequence resumes."""
    long_ticket: Annotated[Array, int64()]
    """The first record of prompt ring 0 with the row's long values (`ipc/long_values.py`); 0 = none are copied."""


class StepFields(Generic[Array]):
    """Scheduler -> GPU process: one step. Only the first `num_*` entries of each array mean anything.

    A step without admissions needs only what lies in front of `admit`. Only steps with `num_prompt_logprobs` need what
    follows the admissions.
    """

    num_seqs: Annotated[Array, int32(1)]
    """Sequences in this step."""
    num_tokens: Annotated[Array, int32(1)]
    """Tokens that this step computes, of all sequences."""
    num_appends: Annotated[Array, int32(1)]
    """Entries that this step adds to block tables."""
    num_admissions: Annotated[Array, int32(1)]
    """Rows that this step admits."""
    variant: Annotated[Array, int32(1)]
    """A SamplerVariant."""
    want_logprobs: Annotated[Array, int32(1)]
    """The most top log-probabilities that a sequence of this step wants, + 1; 0 = none."""
    want_processed: Annotated[Array, int32(1)]
    """1 = a sequence of this step wants processed log-probabilities."""
    num_prompt_logprobs: Annotated[Array, int32(1)]
    """Positions of prompts whose log-probabilities this step computes."""
    planned_at_ns: Annotated[Array, int64(1)]
    """When the scheduler planned the step, in ns of CLOCK_MONOTONIC."""
    seq_row: Annotated[Array, int32("max_num_seqs")]
    """Each sequence's row."""
    seq_num_tokens: Annotated[Array, int32("max_num_seqs")]
    """Tokens of each sequence to compute, at least 1."""
    seq_sample: Annotated[Array, int32("max_num_seqs")]
    """1 = sample a token after them."""
    seq_mask: Annotated[Array, int32("max_num_seqs")]
    """Which of the step's masks applies to each sequence; -1 = none. Read only with SamplerVariant.ADJUSTED."""
    mask_ticket: Annotated[Array, int64("num_mask_rings")]
    """The record of each grammar worker's mask ring that this step needs; 0 = none."""
    num_masks: Annotated[Array, int32("num_mask_rings")]
    """How many masks that record holds. The step's masks are those of worker 0, then those of worker 1, ..."""
    append_row: Annotated[Array, int32("max_appends")]
    """The row whose block table gets an entry."""
    append_index: Annotated[Array, int32("max_appends")]
    """The place of the entry in that block table."""
    append_block: Annotated[Array, int32("max_appends")]
    """The KV block that is entered there."""
    admit: Annotated[Admissions[Array], Each("max_admissions")]
    """The admissions, entry by entry."""
    prompt_logprob_index: Annotated[Array, int32("max_prompt_logprobs")]
    """Tokens among the step's tokens: wanted is the log-probability of the token that follows each in its row."""


class ResultFields(Generic[Array]):
    """GPU process -> scheduler: one step's results, in the order of its sequences.

    `logprob` and what follows it are filled only if the step's `want_logprobs` asks for it; `prompt_logprob` and what
    follows it only if the step has `num_prompt_logprobs`.
    """

    token_ids: Annotated[Array, int32("max_num_seqs")]
    """The sampled token; NO_TOKEN where none was sampled, and for rows that finish as NOT_FINITE."""
    finish: Annotated[Array, int32("max_num_seqs")]
    """A FinishCode for each sequence."""
    device_start_ns: Annotated[Array, int64(1)]
    """When the device began with the step, in ns of CLOCK_MONOTONIC."""
    device_end_ns: Annotated[Array, int64(1)]
    """When the device was done with it, in ns of CLOCK_MONOTONIC."""
    received_at_ns: Annotated[Array, int64(1)]
    """When the GPU process took the step record, in ns of CLOCK_MONOTONIC."""
    device_pause_ns: Annotated[Array, int64(2)]
    """Only of steps that owe masks: when the device was done with the model, and when it went on with the masks, in ns
    of its own clock."""
    closed_masks: Annotated[Array, int32("num_mask_rings")]
    """Only for grammar workers to which the step's masks are due: 1 = they did not come, and counted as closed."""
    logprob: Annotated[Array, float32("max_num_seqs")]
    """The log-probability (natural) of the sampled token."""
    top_ids: Annotated[Array, int32("max_num_seqs", MAX_LOGPROBS)]
    """The likeliest tokens, likeliest first; NO_TOKEN beyond the vocabulary."""
    top_logprobs: Annotated[Array, float32("max_num_seqs", MAX_LOGPROBS)]
    """Their log-probabilities; -inf beyond the vocabulary."""
    extra_logprobs: Annotated[Array, float32("max_num_seqs", MAX_LOGPROB_TOKEN_IDS)]
    """The log-probabilities of the tokens in the row's `logprob_ids` (`ipc/long_values.py`)."""
    prompt_logprob: Annotated[Array, float32("max_prompt_logprobs")]
    """The log-probability of the token that follows each token of the step's `prompt_logprob_index`."""
    prompt_top_ids: Annotated[Array, int32("max_prompt_logprobs", MAX_LOGPROBS)]
    """The likeliest tokens there, likeliest first; NO_TOKEN beyond the vocabulary."""
    prompt_top_logprobs: Annotated[Array, float32("max_prompt_logprobs", MAX_LOGPROBS)]
    """Their log-probabilities; -inf beyond the vocabulary."""


class PromptFields(Generic[Array]):
    """Tokenizer or scheduler -> GPU process: token ids of one prompt.

    A long prompt takes consecutive records. Its length travels with its tickets.
    """

    token_ids: Annotated[Array, int32(PROMPT_RECORD_TOKENS)]


# Records as host processes see them. The device's views are in workers/gpu/execution/tensor_views.py.
StepRecord = StepFields[HostArray]
ResultRecord = ResultFields[HostArray]
PromptRecord = PromptFields[HostArray]


def prompt_layout() -> Layout[PromptRecord]:
    return Layout.of(PromptRecord, "prompt", None)


def step_layout(shape: StepShape) -> Layout[StepRecord]:
    return Layout.of(StepRecord, "step", shape)


def result_layout(shape: StepShape) -> Layout[ResultRecord]:
    return Layout.of(ResultRecord, "result", shape)


@functools.cache
def _needs() -> tuple[tuple[str, float, Needs], ...]:
    """Each parameter that may need a sampler: its name, its default, and what it needs otherwise."""
    found = []
    for column in declared_fields(AdmittedColumns):
        marks = {type(mark): mark for mark in column.marks}
        needs, fill = marks.get(Needs), marks.get(Fill, Fill(0))
        if isinstance(needs, Needs) and isinstance(fill, Fill):
            found.append((column.path[0], float(fill.value), needs))
    return tuple(found)
