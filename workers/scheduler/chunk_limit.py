"""How long prompts may be at a time, so that the tokens of those that stream come in time.

A step's time on the device is taken as a part that it has anyway and one for each token of a prompt; both are learnt
from the steps that have run, the last hundred or so counting most.

    time = base + slope * prompt tokens        the chunk that keeps `bound`: (bound - base) / slope
"""

from __future__ import annotations

from typing import Final

MIN_CHUNK: Final = 16  # prompt tokens that a step takes in whatever the bound is: no prompt may starve
_WEIGHT: Final = 0.03  # of the newest step
_ENOUGH_SPREAD: Final = 4.0  # variance of prompt tokens below which steps are too much alike to learn a slope from


class ChunkLimit:
    """A running regression of step times; a bound of None limits nothing."""

    def __init__(self, bound_s: float | None) -> None:
        self._bound_s = bound_s
        self._num_steps = 0
        self._mean_tokens = self._mean_s = 0.0
        self._variance = self._covariance = 0.0
        self._slope = 0.0  # seconds for each token; 0 = not known yet

    def add_step(self, num_prompt_tokens: int, duration_s: float) -> None:
        """A step has run, with so many tokens more than one for each of its sequences."""
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
        """Prompt tokens for a step in which others stream: at most `budget`, all of it until enough is known."""
        if self._bound_s is None or not self._slope:
            return budget
        base_s = self._mean_s - self._slope * self._mean_tokens
        return min(budget, max(MIN_CHUNK, int((self._bound_s - base_s) / self._slope)))
