"""Which prompts are under way to each tokenizer, and which tokenizer gets the next one.

A tokenizer takes its prompts in the order in which it gets them, so the policy cannot reorder prompts under way to it.
The gateway therefore keeps few under way: enough to keep a tokenizer busy until the gateway reads its sockets again.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Final

_num_bytes: Final = attrgetter("num_bytes")


class Tokenizer:
    """What is under way to one tokenizer."""

    __slots__ = ("identity", "num_bytes", "prompts")

    def __init__(self, identity: bytes) -> None:
        self.identity = identity
        self.num_bytes = 0
        self.prompts: dict[int, int] = {}  # bytes by key


class TokenizerPool:
    """All connected tokenizers.

    Args:
        max_prompts: under way to one tokenizer.
        max_bytes: of their messages; the prompt that reaches the bound is the last one.
    """

    def __init__(self, max_prompts: int, max_bytes: int) -> None:
        self._max_prompts = max_prompts
        self._max_bytes = max_bytes
        self._tokenizers: dict[bytes, Tokenizer] = {}
        self._free: dict[bytes, Tokenizer] = {}  # those that have room

    def next(self) -> Tokenizer | None:
        """The tokenizer with the fewest bytes under way, of those that have room."""
        return min(self._free.values(), key=_num_bytes) if self._free else None

    def give(self, tokenizer: Tokenizer, key: int, num_bytes: int) -> None:
        tokenizer.prompts[key] = num_bytes
        tokenizer.num_bytes += num_bytes
        if len(tokenizer.prompts) >= self._max_prompts or tokenizer.num_bytes >= self._max_bytes:
            del self._free[tokenizer.identity]

    def done(self, identity: bytes, key: int) -> None:
        """A tokenizer has passed on a prompt, or (key 0) has connected."""
        tokenizer = self._tokenizers.get(identity)
        if tokenizer is None:
            tokenizer = self._tokenizers[identity] = Tokenizer(identity)
        tokenizer.num_bytes -= tokenizer.prompts.pop(key, 0)
        if len(tokenizer.prompts) < self._max_prompts and tokenizer.num_bytes < self._max_bytes:
            self._free[identity] = tokenizer
