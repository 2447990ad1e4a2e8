"""Chooses each sequence's next token on the device, with parameters per row.

Owns everything after the adjusted logits: filters, the draw, the check whether the sequence ends, and the write of the
token to the table that the next step reads. `logprobs.py` computes log-probabilities.

The torch code here runs on the CPU, and is the oracle in tests of the kernels that run on CUDA (`triton_sampler.py`).
A graph can capture these kernels: no value on the host decides what they do.

To add a parameter, add a column to AdmittedColumns (`ipc/records.py`), a field of the same name to SamplingParams, a
function here, its counterpart in the kernels, and a case to both tests.
"""

from __future__ import annotations

import torch

from ipc.records import NO_TOKEN, FinishCode, SamplerVariant
from workers.gpu.execution.row_tables import RowTables
from workers.gpu.execution.step_batch import StepBatch
from workers.gpu.execution.tensor_views import ResultTensors
from workers.gpu.sampling.filters import keep_of_rows
from workers.gpu.sampling.logprobs import WantedLogprobs, write_logprobs
from workers.gpu.sampling.random_bits import exponential


def sample(
    variant: SamplerVariant,
    want_logprobs: WantedLogprobs,
    logits: torch.Tensor,
    batch: StepBatch,
    sample_flags: torch.Tensor,
    tables: RowTables,
    outputs: ResultTensors,
    adjusted: torch.Tensor | None = None,
) -> None:
    """Finish a step: sample the flagged sequences, write tokens and results, and set every sequence's number of
    computed tokens.

    Args:
        logits: the model's own, [S, vocab_size], of any floating dtype (on CUDA bfloat16, float16 or float32).
        sample_flags: [S] int32, the step's `seq_sample`; 0 = no token is sampled.
        outputs: a result record on the device; its first S entries are written, log-probabilities only if
            `want_logprobs` asks for them.
        adjusted: [S, vocab_size] float32, the logits to sample from, only with ADJUSTED.
    """
    assert (adjusted is not None) == (variant == SamplerVariant.ADJUSTED), f"{variant!r}: whether logits are adjusted"
    if logits.is_cuda:
        from workers.gpu.sampling import triton_sampler  # imported here: only CUDA needs triton

        tokens = triton_sampler.sample(variant, logits, batch, sample_flags, tables, outputs, adjusted)
    else:
        tokens = _sample(variant, logits, batch, sample_flags, tables, outputs, adjusted)
    if want_logprobs != WantedLogprobs.NONE:
        write_logprobs(want_logprobs, logits, adjusted, tokens, batch.seq_row, tables, outputs)


def _sample(
    variant: SamplerVariant,
    logits: torch.Tensor,
    batch: StepBatch,
    sample_flags: torch.Tensor,
    tables: RowTables,
    outputs: ResultTensors,
    adjusted: torch.Tensor | None,
) -> torch.Tensor:
    """Do the work of `sample`, except log-probabilities. Returns every sequence's token, [S] int64."""
    num_seqs = batch.num_seqs
    rows = batch.seq_row
    position = batch.seq_lens  # of the new token; all tokens before it are computed now
    source = logits if adjusted is None else adjusted
    maximum, tokens = source.max(-1)  # the first of equal logits; in a row with NaN, the NaN
    drawn, filtered = variant != SamplerVariant.GREEDY, variant == SamplerVariant.FILTERED
    if variant == SamplerVariant.ADJUSTED:  # its rows may need any sampler
        drawn, filtered = _needs(rows, tables)
    if drawn:
        tokens = race(source.float(), maximum.float(), rows, position, tables, filtered=filtered).argmax(-1)

    sampled = (sample_flags != 0) & (batch.seq_lens > 0)  # [S] bool; False for padding
    tokens32 = tokens.to(torch.int32)
    max_model_len = tables.token_ids.shape[1]
    rows64 = rows.to(torch.int64)
    places = torch.where(sampled, rows64 * max_model_len + position, tables.trash_row * max_model_len)
    tables.flat_token_ids.index_copy_(0, places, tokens32)
    # For all sequences, sampled or not; the trash row stays at 0.
    tables.num_computed_tokens.index_copy_(0, rows64, batch.seq_lens)

    is_end = (tables.end_ids.index_select(0, rows) == tokens32[:, None]).any(-1)
    is_full = position + 1 >= tables.max_len.index_select(0, rows)
    is_finite = maximum.isfinite()
    finish = torch.where(is_end, FinishCode.STOP, is_full.to(torch.int32) * FinishCode.LENGTH)
    finish = torch.where(is_finite, finish, FinishCode.NOT_FINITE)
    if adjusted is not None:  # the stage keeps NaN and +inf
        is_excluded = (maximum == -torch.inf) & (logits.amax(-1) > -torch.inf)
        finish = torch.where(is_excluded, FinishCode.EXCLUDED, finish)
    torch.mul(finish, sampled, out=outputs.finish[:num_seqs])
    outputs.token_ids[:num_seqs].copy_(torch.where(sampled & is_finite, tokens32, NO_TOKEN))
    return tokens


def _needs(rows: torch.Tensor, tables: RowTables) -> tuple[bool, bool]:
    """Whether one of these rows is drawn, and whether one of those that are has filters."""
    is_drawn = tables.temperature[rows] > 0
    has_filters = (tables.top_k[rows] > 0) | (tables.top_p[rows] < 1) | (tables.min_p[rows] > 0)
    return bool(is_drawn.any()), bool((is_drawn & has_filters).any())


def race(
    logits: torch.Tensor,
    maximum: torch.Tensor,
    rows: torch.Tensor,
    position: torch.Tensor,
    tables: RowTables,
    *,
    filtered: bool,
) -> torch.Tensor:
    """Return the scores of the exponential race, [S, vocab_size]: log(p / e) with e ~ Exp(1).

    Token i has the largest p / e with probability p_i. For e_i / p_i is exponentially distributed with rate p_i, and of
    several such variables each is the smallest in proportion to its rate. (The Gumbel-max trick is the same race.)
    Rows of temperature 0 get neither noise nor filters: their winner is the argmax.
    """
    temperature = tables.temperature.index_select(0, rows)
    is_greedy = (temperature == 0)[:, None]
    # The likeliest token's logit becomes 0 first, so that even the smallest temperature cannot overflow it.
    scaled = logits - maximum[:, None]
    scaled /= torch.where(is_greedy, 1.0, temperature[:, None])
    noise = exponential(tables.seed.index_select(0, rows), position.to(torch.int64), logits.shape[1]).log_()
    scores = scaled - torch.where(is_greedy, 0.0, noise)
    return torch.where(keep_of_rows(scaled, rows, tables) | is_greedy, scores, -torch.inf) if filtered else scores
