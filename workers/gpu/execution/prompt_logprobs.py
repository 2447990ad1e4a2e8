"""The first half of a step that computes log-probabilities of prompts, beside the logits that every step computes.

Such steps are launched piece by piece, never captured in a graph. Everything else about them is as in other steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from ipc.records import NO_TOKEN, StepShape
from ipc.sampling_params import MAX_LOGPROBS
from workers.gpu.execution.batch_builder import BatchBuilder
from workers.gpu.execution.model_runner import ModelRunner
from workers.gpu.execution.row_tables import RowTables
from workers.gpu.execution.step_batch import StepBatch
from workers.gpu.execution.tensor_views import ResultTensors, StepTensors

_MIN_ROWS: Final = 64


def max_logits_rows(shape: StepShape) -> int:
    """Rows of logits that lie in memory at a time: as many as the sampler has, but enough for the head's product."""
    return min(shape.max_prompt_logprobs, max(_MIN_ROWS, shape.max_num_seqs))


class PromptLogprobs:
    """Makes the work. `step` and `result` are the device's records, `logits` [max_num_seqs, vocab_size] the sampler's
    input."""

    def __init__(
        self,
        runner: ModelRunner,
        builder: BatchBuilder,
        tables: RowTables,
        step: StepTensors,
        result: ResultTensors,
        logits: torch.Tensor,
    ) -> None:
        self._runner = runner
        self._builder = builder
        self._tables = tables
        self._step = step
        self._result = result
        self._logits = logits
        self._max_rows = max_logits_rows(tables.shape)

    def model(self, num_seqs: int, num_tokens: int, num_positions: int) -> Callable[[], None]:
        """A step of bucket (S, T): its record becomes a batch, the batch logits, and `num_positions` of its tokens
        log-probabilities."""
        batch = self._builder.batch(num_seqs, num_tokens)
        fill = self._builder.filler(batch)
        index32 = self._step.prompt_logprob_index[:num_positions]

        def model() -> None:
            fill()
            index = index32.to(torch.int64)
            followers = next_tokens(batch, index, self._tables)
            start = 0
            pieces = self._runner.prompt_logits(batch, index, self._max_rows, out=self._logits[: batch.num_seqs])
            for logits in pieces:
                end = start + len(logits)
                write_prompt_logprobs(logits, followers[start:end], self._result, start)
                start = end

        return model


def next_tokens(batch: StepBatch, index: torch.Tensor, tables: RowTables) -> torch.Tensor:
    """The ids that follow tokens of a batch in their rows, [N] int64. `index` [N] int64 are the tokens' places."""
    ends = batch.cu_seqlens[1:].to(torch.int64)
    sequences = torch.searchsorted(ends, index, right=True)
    rows = batch.seq_row.index_select(0, sequences).to(torch.int64)
    places = rows * tables.token_ids.shape[1] + batch.positions.index_select(0, index) + 1
    return tables.flat_token_ids.take(places).to(torch.int64)


def write_prompt_logprobs(logits: torch.Tensor, tokens: torch.Tensor, outputs: ResultTensors, start: int) -> None:
    """Write the model's own log-probabilities of `tokens` [n] int64, and of the likeliest tokens at their positions.

    Row i of `logits` [n, vocab_size] goes to entry `start` + i of the result's `prompt_*` fields. If the vocabulary is
    smaller than MAX_LOGPROBS, the rest is NO_TOKEN and -inf.
    """
    scores = logits.float()
    norm = scores.logsumexp(-1, keepdim=True)
    rows = slice(start, start + len(tokens))
    outputs.prompt_logprob[rows].copy_((scores.gather(-1, tokens[:, None]) - norm)[:, 0])
    num_top = min(MAX_LOGPROBS, logits.shape[1])
    top = scores.topk(num_top, -1)
    outputs.prompt_top_logprobs[rows, :num_top].copy_(top.values - norm)
    outputs.prompt_top_ids[rows, :num_top].copy_(top.indices)
    if num_top < MAX_LOGPROBS:
        outputs.prompt_top_logprobs[rows, num_top:].fill_(-torch.inf)
        outputs.prompt_top_ids[rows, num_top:].fill_(NO_TOKEN)
