"""A claim on the prompt records that hold a sequence's token ids."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(eq=False)
class PromptLease:
    """A claim on `num_records` consecutive records of a prompt ring, from `ticket` on. They hold `num_words` words.

    `PromptRings` (`admission/prompt_rings.py`) makes and releases leases. It may also release the lease of a sequence
    that is still waiting: the sequence keeps its own copy of the ids and is sent from the upload ring later.
    """

    ring: int
    ticket: int
    num_records: int
    num_words: int
    is_waiting: bool  # its sequence has not been admitted yet
    is_released: bool = False
