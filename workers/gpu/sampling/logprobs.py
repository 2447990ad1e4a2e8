"""Writes the log-probabilities that sequences ask for: of the sampled token, of the likeliest tokens, of named tokens.

Raw ones are those of the model's own logits. Processed ones are of what the token was sampled from: adjusted logits,
divided by the temperature, over the tokens that the filters keep (vLLM's `processed_logprobs`). Everything is plain
torch: such steps are few, and log-probabilities cost about as much as the sampler.
"""

from __future__ import annotations

import enum
from typing import Final

import torch

from ipc.records import NO_TOKEN
from ipc.sampling_params import MAX_LOGPROBS
from workers.gpu.execution.row_tables import RowTables
from workers.gpu.execution.tensor_views import ResultTensors
from workers.gpu.sampling.filters import keep_of_rows

PROCESSED_ROWS: Final = 64  # sequences whose filters are applied at a time, which bounds the memory
PROCESSED_BYTES: Final = 32  # of temporary tensors for each logit of these


class WantedLogprobs(enum.IntEnum):
    """What a step's sequences ask for; the most demanding decides."""

    NONE = 0
    RAW = 1
    PROCESSED = 2  # of some sequence; only with SamplerVariant.ADJUSTED


def write_logprobs(
    wanted: WantedLogprobs,
    logits: torch.Tensor,
    adjusted: torch.Tensor | None,
    tokens: torch.Tensor,
    rows: torch.Tensor,
    tables: RowTables,
    outputs: ResultTensors,
) -> None:
    """Write `logprob` and `top_*` of the results, and `extra_logprobs` if the step has adjusted logits.

    Args:
        logits: [S, vocab_size], the model's own.
        adjusted: [S, vocab_size] float32; None = no sequence of this step asks for adjustments.
        tokens, rows: [S], the sampled token and the row of each sequence.

    If the vocabulary is smaller than MAX_LOGPROBS, the rest is NO_TOKEN and -inf.
    """
    num_seqs, vocab_size = logits.shape
    logprobs = logits.log_softmax(-1, torch.float32)
    if adjusted is not None and wanted == WantedLogprobs.PROCESSED:
        for start in range(0, num_seqs, PROCESSED_ROWS):
            part = slice(start, start + PROCESSED_ROWS)
            is_processed = tables.processed_logprobs.index_select(0, rows[part])[:, None] != 0
            processed = _processed(adjusted[part], rows[part], tables)
            torch.where(is_processed, processed, logprobs[part], out=logprobs[part])
    outputs.logprob[:num_seqs].copy_(logprobs.gather(-1, tokens[:, None])[:, 0])
    num_top = min(MAX_LOGPROBS, vocab_size)
    top = logprobs.topk(num_top, -1)
    outputs.top_logprobs[:num_seqs, :num_top].copy_(top.values)
    outputs.top_ids[:num_seqs, :num_top].copy_(top.indices)
    if num_top < MAX_LOGPROBS:
        outputs.top_logprobs[:num_seqs, num_top:].fill_(-torch.inf)
        outputs.top_ids[:num_seqs, num_top:].fill_(NO_TOKEN)
    if adjusted is not None:
        # A row without such ids has a former owner's, whose log-probabilities nobody reads.
        ids = tables.long_values.logprob_ids.index_select(0, rows).clamp_(0, vocab_size - 1)
        outputs.extra_logprobs[:num_seqs].copy_(logprobs.gather(-1, ids.to(torch.int64)))


def _processed(adjusted: torch.Tensor, rows: torch.Tensor, tables: RowTables) -> torch.Tensor:
    """[S, vocab_size] float32: the log-probabilities of what each sequence samples from. Greedy ones filter nothing."""
    temperature = tables.temperature.index_select(0, rows)[:, None]
    is_greedy = temperature == 0
    scaled = adjusted - adjusted.amax(-1, keepdim=True)
    scaled /= torch.where(is_greedy, 1.0, temperature)
    kept = keep_of_rows(scaled, rows, tables) | is_greedy
    return scaled.masked_fill_(~kept, -torch.inf).log_softmax(-1)
