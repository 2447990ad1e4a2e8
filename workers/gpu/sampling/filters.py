"""top_k, top_p and min_p in torch: which tokens of each row are kept.

The thresholds are found by bisection, in a fixed number of passes, without sorting the vocabulary. `triton_filters.py`
does the same in the sampler's kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from workers.gpu.execution.row_tables import RowTables

_KEY_BITS: Final = 32  # bits of a float32, which is also the number of passes of a bisection over its order
_INT32_MAX: Final = 2**31 - 1


def keep_of_rows(scaled: torch.Tensor, rows: torch.Tensor, tables: RowTables) -> torch.Tensor:
    """Return the tokens that the filters of these rows keep: see `keep`."""
    return keep(scaled, *(column.index_select(0, rows) for column in (tables.top_k, tables.top_p, tables.min_p)))


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
