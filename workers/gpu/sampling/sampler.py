"""Chooses each sequence's next token on the device, with parameters per row.

Owns everything after the logits: filters, the draw, log-probabilities, the check whether the sequence ends, and the
write of the token to the table that the next step reads. A graph can capture it, because no value on the host decides
what it does.

The torch code here runs on the CPU, and is the oracle in tests of the kernels that run on CUDA (`triton_sampler.py`).
It finds the thresholds of the filters by bisection, in a fixed number of passes, without sorting the vocabulary.

To add a parameter, add a column to AdmittedColumns (`ipc/records.py`), a field of the same name to SamplingParams, a
function here, its counterpart in the kernels, and a case to both tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from ipc.records import NO_TOKEN, FinishCode, SamplerVariant
from ipc.sampling_params import MAX_LOGPROBS
from workers.gpu.execution.row_tables import RowTables
from workers.gpu.execution.step_batch import StepBatch
from workers.gpu.execution.tensor_views import ResultTensors
from workers.gpu.sampling.random_bits import exponential

_KEY_BITS: Final = 32  # bits of a float32, which is also the number of passes of a bisection over its order
_INT32_MAX: Final = 2**31 - 1


def sample(
    variant: SamplerVariant,
    want_logprobs: bool,
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
        logits: [S, vocab_size], of any floating dtype (on CUDA bfloat16, float16 or float32).
        sample_flags: [S] int32, the step's `seq_sample`; 0 = no token is sampled.
        outputs: a result record on the device; its first S entries are written, `logprob` and `top_*` only if
            `want_logprobs`.
        adjusted: [S, vocab_size] float32, the logits to sample from, only with ADJUSTED.
    """
    source = logits if adjusted is None else adjusted
    if logits.is_cuda:
        from workers.gpu.sampling import triton_sampler  # imported here: only CUDA needs triton

        tokens = triton_sampler.sample(variant, source, batch, sample_flags, tables, outputs)
    else:
        tokens = _sample(variant, source, batch, sample_flags, tables, outputs)
    if adjusted is not None:
        write_excluded(logits, adjusted, outputs)
    if want_logprobs:
        write_logprobs(logits, tokens, outputs)


def _sample(
    variant: SamplerVariant,
    logits: torch.Tensor,
    batch: StepBatch,
    sample_flags: torch.Tensor,
    tables: RowTables,
    outputs: ResultTensors,
) -> torch.Tensor:
    """Do the work of `sample`, except log-probabilities. Returns every sequence's token, [S] int64."""
    num_seqs = batch.num_seqs
    rows = batch.seq_row
    position = batch.seq_lens  # of the new token; all tokens before it are computed now
    maximum, tokens = logits.max(-1)  # the first of equal logits; in a row with NaN, the NaN
    if variant != SamplerVariant.GREEDY:
        filtered = variant >= SamplerVariant.FILTERED
        tokens = race(logits.float(), maximum.float(), rows, position, tables, filtered=filtered).argmax(-1)

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
    torch.mul(finish, sampled, out=outputs.finish[:num_seqs])
    outputs.token_ids[:num_seqs].copy_(torch.where(sampled & is_finite, tokens32, NO_TOKEN))
    return tokens


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
    if not filtered:
        return scores
    kept = keep(
        scaled,
        tables.top_k.index_select(0, rows),
        tables.top_p.index_select(0, rows),
        tables.min_p.index_select(0, rows),
    )
    return torch.where(kept | is_greedy, scores, -torch.inf)


def keep(scaled: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Return the tokens that top_k, top_p and min_p keep, applied in this order: [S, vocab_size] bool.

    `scaled` [S, vocab_size] are the logits divided by temperature, at most 0; the parameters are [S]. Tokens of equal
    logits are all kept or all dropped. The likeliest token is always kept.
    """
    keys = ordered_keys(scaled)
    kept = keys >= top_k_threshold(keys, top_k)
    probabilities = torch.where(kept, scaled, -torch.inf).softmax(-1)
    kept &= keys >= top_p_threshold(keys, probabilities, top_p)
    kept &= scaled >= min_p.log()[:, None]  # p >= min_p * p_max, and log p_max is 0 here
    return kept


def ordered_keys(x: torch.Tensor) -> torch.Tensor:
    """Map float32 values to int32 keys of the same order."""
    bits = (x + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    return bits ^ ((bits >> 31) & _INT32_MAX)


def top_k_threshold(keys: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """Return the k-th largest key of each row, [S, 1] int32; below every key if top_k is 0 or above the vocabulary's
    size."""
    wanted = torch.where(top_k == 0, _INT32_MAX, top_k)[:, None]
    return _largest_threshold(keys.shape[0], keys.device, lambda t: (keys >= t).sum(-1, keepdim=True) >= wanted)


def top_p_threshold(keys: torch.Tensor, probabilities: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Return the smallest key of the smallest set with a probability of at least top_p, [S, 1] int32; below every key
    if top_p is 1."""
    # At 1 every token is kept, even if the sum rounds below 1.
    wanted = torch.where(top_p >= 1, torch.inf, top_p)[:, None]
    return _largest_threshold(
        keys.shape[0], keys.device, lambda t: (probabilities * (keys >= t)).sum(-1, keepdim=True) >= wanted
    )


def _largest_threshold(
    num_rows: int, device: torch.device, reaches: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return the largest int32 for which `reaches` is true, [S, 1], by bisection; -2**31 if it is true for none.

    `reaches` takes thresholds [S, 1]. It is true up to some threshold, and false beyond it.
    """
    low = torch.full((num_rows, 1), -(2**31), dtype=torch.int64, device=device)
    high = torch.full((num_rows, 1), _INT32_MAX, dtype=torch.int64, device=device)
    for _ in range(_KEY_BITS):
        middle = (low + high + 1) >> 1
        reached = reaches(middle.to(torch.int32))
        low = torch.where(reached, middle, low)
        high = torch.where(reached, high, middle - 1)
    return low.to(torch.int32)


def write_excluded(logits: torch.Tensor, adjusted: torch.Tensor, outputs: ResultTensors) -> None:
    """Tell the sequences whose tokens are all excluded from those whose own logits are not finite."""
    finish = outputs.finish[: logits.shape[0]]
    excluded = (adjusted.amax(-1) == -torch.inf) & (logits.amax(-1) > -torch.inf) & (finish == FinishCode.NOT_FINITE)
    finish.masked_fill_(excluded, FinishCode.EXCLUDED)


def write_logprobs(logits: torch.Tensor, tokens: torch.Tensor, outputs: ResultTensors) -> None:
    """Write the model's own log-probabilities, before temperature and filters: of each sequence's token, and of the
    likeliest MAX_LOGPROBS tokens.

    If the vocabulary is smaller than that, the rest is NO_TOKEN and -inf.
    """
    num_seqs, vocab_size = logits.shape
    logprobs = logits.log_softmax(-1, torch.float32)
    outputs.logprob[:num_seqs].copy_(logprobs.gather(-1, tokens[:, None])[:, 0])
    num_top = min(MAX_LOGPROBS, vocab_size)
    top = logprobs.topk(num_top, -1)
    outputs.top_logprobs[:num_seqs, :num_top].copy_(top.values)
    outputs.top_ids[:num_seqs, :num_top].copy_(top.indices)
    if num_top < MAX_LOGPROBS:
        outputs.top_logprobs[:num_seqs, num_top:].fill_(-torch.inf)
        outputs.top_ids[:num_seqs, num_top:].fill_(NO_TOKEN)
