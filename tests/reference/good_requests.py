"""Good requests beside hostile ones: the same again and again, whose answers must stay the same."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Final

PROMPTS: Final = ("A class", "A list", "The json module", "def f(")
NUM_TOKENS: Final = 12  # of each answer
PAUSE_S: Final = 0.02  # after each answer


class GoodRequests(ABC):
    """Greedy requests for NUM_TOKENS tokens. A subclass sends them its own way."""

    def __init__(self) -> None:
        self.num_answers = 0
        self.faults: list[str] = []
        self._first: dict[str, list[int]] = {}

    @abstractmethod
    def answers(self, prompt: str) -> AsyncIterator[list[int] | str]:
        """Send the prompt each time that the next answer is asked for: its token ids, or what went wrong."""

    async def run(self) -> None:
        """Until cancelled. Prompt by prompt, the first answer is what all later ones must be."""
        await asyncio.gather(*(self._repeat(prompt) for prompt in PROMPTS))

    async def _repeat(self, prompt: str) -> None:
        async with aclosing(self.answers(prompt)) as answers:
            async for tokens in answers:
                self.num_answers += not isinstance(tokens, str)
                if isinstance(tokens, str):
                    self.faults.append(f"{prompt}: {tokens}")
                elif len(tokens) != NUM_TOKENS or tokens != self._first.setdefault(prompt, tokens):
                    self.faults.append(f"{prompt}: {tokens} instead of {self._first[prompt]}")
                await asyncio.sleep(PAUSE_S)
