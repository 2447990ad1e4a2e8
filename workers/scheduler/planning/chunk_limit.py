"""How many prompt tokens a step may compute beside decodes, so that `scheduler.max_itl_ms` is kept.

A running regression learns the device's step times. The last hundred steps or so count most:

    time = base + slope * prompt tokens        the largest chunk within `bound`: (bound - base) / slope
"""

from __future__ import annotations

from typing import Final

MIN_CHUNK: Final = 16  # prompt tokens of a step, however low the bound is: no prompt may starve
_WEIGHT: Final = 0.03  # of the newest step
_ENOUGH_SPREAD: Final = 4.0  # variance of prompt tokens below which steps are too similar to learn a slope from


class ChunkLimit:
    """`bound_s` is the longest step allowed while sequences decode; None = no limit."""

    def __init__(self, bound_s: float | None) -> None:
        self._bound_s = bound_s
        self._num_steps = 0
        self._mean_tokens = self._mean_s = 0.0
        self._variance = self._covariance = 0.0
        self._slope = 0.0  # seconds for each prompt token; 0 = not known yet

    def add_step(self, num_prompt_tokens: int, duration_s: float) -> None:
        """Learn from a finished step. `num_prompt_tokens` counts its tokens beyond one for each sequence."""
        if self._bound_s is None:
            return
        self._num_steps += 1
        weight = max(_WEIGHT, 1 / self._num_steps)
        off_tokens, off_s = num_prompt_tokens - self._mean_tokens, duration_s - self._mean_s
        self._mean_tokens += weight * off_tokens
        self._mean_s += weight * off_s
        self._variance = (1 - weight) * (self._variance + weight * off_tokens * off_tokens)
        self._covariance = (1 - weight) * (self._covariance + weight * off_tokens * off_s)
        if self._variance >= _ENOUGH_SPREAD and self._covariance > 0:
            self._slope = self._covariance / self._variance

    def max_tokens(self, budget: int) -> int:
        """Prompt tokens allowed in a step with decodes: at most `budget`, and all of it until the slope is known."""
        if self._bound_s is None or not self._slope:
            return budget
        base_s = self._mean_s - self._slope * self._mean_tokens
        return min(budget, max(MIN_CHUNK, int((self._bound_s - base_s) / self._slope)))
