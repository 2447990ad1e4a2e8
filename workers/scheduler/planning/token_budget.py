"""How a step's token budget is shared among the running rows."""

from __future__ import annotations

import numpy as np

from workers.scheduler.array_types import IntArray


def share_tokens(
    rows: IntArray, remaining: IntArray, budget: int, chunk: int, most: IntArray | None = None
) -> tuple[IntArray, IntArray, int]:
    """Share `budget` tokens among rows. `rows` are in order of admission, and `remaining` [num_rows] counts the tokens
    that each still has to compute.

    Decodes, which have one token left, come first. Prompts share the rest in order, cut into chunks. Beside decodes,
    prompts get at most `chunk` tokens in all. `most` [num_rows] limits the tokens of each prompt; None = no limits.

    Returns the rows that get tokens (decodes in front), the tokens of each, and the tokens left for other prompts.
    """
    if not rows.size:
        return rows, remaining, budget
    if remaining.max() == 1:
        if rows.size > budget:
            return rows[:budget], remaining[:budget], 0
        return rows, remaining, min(budget - rows.size, chunk)
    is_decode = remaining == 1
    decodes = rows[is_decode][:budget]
    prompts, wanted = rows[~is_decode], (remaining if most is None else np.minimum(remaining, most))[~is_decode]
    before = wanted.cumsum() - wanted
    left = min(budget - len(decodes), chunk) if len(decodes) else budget
    chunks = np.clip(left - before, 0, wanted)
    served = chunks > 0
    return (
        np.concatenate((decodes, prompts[served])),
        np.concatenate((np.ones(len(decodes), np.int64), chunks[served])),
        left - int(chunks.sum()),
    )
