"""What adjustments do to the logits of one row, written from the definitions in plain Python."""

from __future__ import annotations

import math
from collections import Counter


def by_definition(
    x: list[float],
    ids: list[int],
    prompt_len: int,
    *,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    min_tokens: int = 0,
    end_ids: list[int] | None = None,
    thinking: tuple[int, int, int] | None = None,
    allowed: set[int] | None = None,
    bias: dict[int, float] | None = None,
    bad_words: list[list[int]] | None = None,
    grammar: set[int] | None = None,
) -> list[float]:
    """The logits `x` of one row after `ids`, of which the first `prompt_len` are the prompt. Changes `x`.

    Args:
        bad_words: their token ids; a word of one token is excluded everywhere.
        thinking: the tokens that begin and end thinking, and its budget.
        allowed, grammar: the only tokens that may follow.
    """
    output = ids[prompt_len:]
    excluded: set[int] = set()
    for word in bad_words or []:
        if len(output) >= len(word) - 1 and output[len(output) - len(word) + 1 :] == word[:-1]:
            excluded.add(word[-1])
    for token, value in (bias or {}).items():
        x[token] += value
    if len(output) < min_tokens:
        excluded |= set(end_ids or [])
    if thinking is not None and must_end_thinking(ids, prompt_len, *thinking):
        excluded |= set(range(len(x))) - {thinking[1]}
    for token in set(ids):
        x[token] = x[token] / repetition_penalty if x[token] > 0 else x[token] * repetition_penalty
    for token, count in Counter(output).items():
        x[token] -= frequency_penalty * count + presence_penalty
    for mask in (allowed, grammar):
        if mask is not None:
            excluded |= set(range(len(x))) - mask
    return [-math.inf if token in excluded else value for token, value in enumerate(x)]


def must_end_thinking(ids: list[int], prompt_len: int, start: int, end: int, budget: int) -> bool:
    """Whether thinking has begun, has not ended, and has used up its budget with tokens of the output."""
    last_start = max((i for i, token in enumerate(ids) if token == start), default=-1)
    if last_start < 0 or end in ids[last_start:]:
        return False
    return len(ids) - max(last_start + 1, prompt_len) >= budget
