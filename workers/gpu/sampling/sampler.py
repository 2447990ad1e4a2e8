"""Chooses each sequence's next token, on the device, with every parameter per row.

Owns what follows the logits: filters, the draw, log-probabilities, whether the row ends, and the write of the token to
where the next step reads it. Like the batch builder, it can be captured: no host value decides what is done.

What is here is what the CPU runs, and the oracle of the kernels that CUDA runs (`triton_sampler.py`): thresholds by
bisection, a fixed number of passes, no sort of the vocabulary.

To add a parameter: a column in `ipc/records.py` (AdmittedColumns), a field of the same name in SamplingParams, a
function here, the same in the kernels, and a row in both tests.
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

_KEY_BITS: Final = 32  # of a float32, and the passes that a bisection over its order takes
_INT32_MAX: Final = 2**31 - 1


def sample(
    variant: SamplerVariant,
    want_logprobs: bool,
    logits: torch.Tensor,
    batch: StepBatch,
    sample_flags: torch.Tensor,
    tables: RowTables,
    outputs: ResultTensors,
) -> None:
    """Finish a step: sample where asked, write tokens and results, and move every sequence on.

    Args:
        logits: [S, vocab_size], of any floating dtype (on CUDA bfloat16, float16 or float32).
        sample_flags: [S] int32, the step's `seq_sample`.
        outputs: a result record on the device; its first S entries are written, `logprob` and `top_*` only if
            `want_logprobs`.
    """
    if logits.is_cuda:
        from workers.gpu.sampling import triton_sampler  # needs triton, which only CUDA needs

        tokens = triton_sampler.sample(variant, logits, batch, sample_flags, tables, outputs)
    else:
        tokens = _sample(variant, logits, batch, sample_flags, tables, outputs)
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
    """What `sample` does, but for log-probabilities. Returns every row's token, [S] int64."""
    num_seqs = batch.num_seqs
    rows = batch.seq_row
    position = batch.seq_lens  # of the new token: everything in front of it is computed now
    maximum, tokens = logits.max(-1)  # of equals the first; of a row with NaN that
    if variant != SamplerVariant.GREEDY:
        filtered = variant == SamplerVariant.FILTERED
        tokens = race(logits.float(), maximum.float(), rows, position, tables, filtered=filtered).argmax(-1)

    sampled = (sample_flags != 0) & (batch.seq_lens > 0)  # [S] bool; padding is not
    tokens32 = tokens.to(torch.int32)
    max_model_len = tables.token_ids.shape[1]
    rows64 = rows.to(torch.int64)
    places = torch.where(sampled, rows64 * max_model_len + position, tables.trash_row * max_model_len)
    tables.flat_token_ids.index_copy_(0, places, tokens32)
    tables.num_computed_tokens.index_copy_(0, rows64, batch.seq_lens)  # sampled or not; the trash row stays at 0

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
    """Scores [S, vocab_size] of the exponential race: p / e with e ~ Exp(1), which a token wins with its probability p.

    They are logarithms. Rows of temperature 0 take no noise and no filter: their winner is the argmax.
    """
    temperature = tables.temperature.index_select(0, rows)
    is_greedy = (temperature == 0)[:, None]
    # The likeliest token's logit becomes 0 first, so that no temperature, however small, can overflow it.
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
    """Which tokens top_k, top_p and min_p, applied in this order, leave: [S, vocab_size] bool. Equals stay together.

    `scaled` [S, vocab_size] are logits over temperature, at most 0; the parameters are [S]. The likeliest always stays.
    """
    keys = ordered_keys(scaled)
    kept = keys >= top_k_threshold(keys, top_k)
    probabilities = torch.where(kept, scaled, -torch.inf).softmax(-1)
    kept &= keys >= top_p_threshold(keys, probabilities, top_p)
    kept &= scaled >= min_p.log()[:, None]  # p >= min_p * p_max, and log p_max is 0 here
    return kept


def ordered_keys(x: torch.Tensor) -> torch.Tensor:
    """int32 in the order of the float32 values."""
    bits = (x + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    return bits ^ ((bits >> 31) & _INT32_MAX)


def top_k_threshold(keys: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """The k-th largest key of each row, [S, 1] int32; below every key where top_k is 0 or more than there are."""
    wanted = torch.where(top_k == 0, _INT32_MAX, top_k)[:, None]
    return _largest_threshold(keys.shape[0], keys.device, lambda t: (keys >= t).sum(-1, keepdim=True) >= wanted)


def top_p_threshold(keys: torch.Tensor, probabilities: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The smallest key of the smallest set whose probability reaches top_p, [S, 1] int32; below every key at 1."""
    wanted = torch.where(top_p >= 1, torch.inf, top_p)[:, None]  # at 1 nothing goes, whatever the sum rounds to
    return _largest_threshold(
        keys.shape[0], keys.device, lambda t: (probabilities * (keys >= t)).sum(-1, keepdim=True) >= wanted
    )


def _largest_threshold(
    num_rows: int, device: torch.device, reaches: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Bisect for the largest int32 whose set of keys at or above it `reaches` what is wanted; -2**31 if none does.

    `reaches` takes thresholds [S, 1] and is true up to some threshold, and false beyond.
    """
    low = torch.full((num_rows, 1), -(2**31), dtype=torch.int64, device=device)
    high = torch.full((num_rows, 1), _INT32_MAX, dtype=torch.int64, device=device)
    for _ in range(_KEY_BITS):
        middle = (low + high + 1) >> 1
        reached = reaches(middle.to(torch.int32))
        low = torch.where(reached, middle, low)
        high = torch.where(reached, high, middle - 1)
    return low.to(torch.int32)


def write_logprobs(logits: torch.Tensor, tokens: torch.Tensor, outputs: ResultTensors) -> None:
    """The model's own log-probabilities: of each sequence's token, and of the likeliest MAX_LOGPROBS.

    Where the vocabulary is smaller than that, the rest is NO_TOKEN and -inf.
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
