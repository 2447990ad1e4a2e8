"""How many prompt tokens a step may compute beside decodes, so that `scheduler.max_itl_ms` is kept.

    base  = time of steps that only decode, a running average
    slope = what prompt tokens added to their steps: decaying sum of (time - base) / decaying sum of tokens
    the largest chunk within `bound`: (bound - base) / slope

Both sums take steps with prompt tokens alone, and weigh a step by its tokens. So seconds of pure decode, whose times
vary by more than a few prompt tokens cost, teach nothing about the slope. An outdated base does no harm: a step of the
largest chunk that takes longer than `bound` raises the slope until it does not.
"""

from __future__ import annotations

from typing import Final

MIN_CHUNK: Final = 16  # prompt tokens of a step, however low the bound is: no prompt may starve
_BASE_WEIGHT: Final = 0.1  # of the newest step that only decodes
_KEPT: Final = 0.9  # of the sums, at each step with prompt tokens


class ChunkLimit:
    """`bound_s` is the longest step allowed while sequences decode; None = no limit."""

    def __init__(self, bound_s: float | None) -> None:
        self._bound_s = bound_s
        self._base_s: float | None = None  # None: no step has only decoded
        self._added_s = 0.0
        self._num_tokens = 0.0

    def add_step(self, num_prompt_tokens: int, duration_s: float) -> None:
        """Learn from a finished step. `num_prompt_tokens` counts its tokens beyond one for each sequence."""
        if self._bound_s is None:
            return
        if num_prompt_tokens > 0:
            self._added_s = _KEPT * self._added_s + max(duration_s - (self._base_s or 0.0), 0.0)
            self._num_tokens = _KEPT * self._num_tokens + num_prompt_tokens
        elif self._base_s is None:
            self._base_s = duration_s
        else:
            self._base_s += _BASE_WEIGHT * (duration_s - self._base_s)

    def max_tokens(self, budget: int) -> int:
        """Prompt tokens allowed in a step with decodes: at most `budget`, and all of it until the slope is known."""
        if self._bound_s is None or not self._added_s:
            return budget
        slope = self._added_s / self._num_tokens
        return min(budget, max(MIN_CHUNK, int((self._bound_s - (self._base_s or 0.0)) / slope)))
