"""What the engine can serve at all: the length of a sequence, and why a request is refused at once."""

from __future__ import annotations

from dataclasses import dataclass

from ipc.errors import InvalidRequest, QueueFull
from ipc.messages import Ended, Tokenized


@dataclass(frozen=True)
class Limits:
    """Fixed for the scheduler's life."""

    max_model_len: int
    block_size: int
    num_blocks: int
    max_num_waiting: int
    max_num_seqs: int

    @property
    def num_cache_tokens(self) -> int:
        return self.num_blocks * self.block_size

    def max_len(self, message: Tokenized) -> int:
        """The length, prompt and output, at which a request ends."""
        max_tokens = message.params.max_tokens
        if max_tokens is None:
            return min(self.max_model_len, self.num_cache_tokens)
        return min(self.max_model_len, message.num_prompt_tokens + max_tokens)

    def refusal(self, message: Tokenized, num_waiting: int, num_free_rows: int) -> Ended | None:
        """Why a request cannot be served while so many wait and so many rows are free; None if it can."""

        def error(code: str, text: str) -> Ended:
            return Ended(key=message.key, finish_reason="error", error_code=code, error_message=text)

        num_prompt, max_len = message.num_prompt_tokens, self.max_len(message)
        num_samples = message.params.n  # all are taken, or none is
        if message.error_code:
            return error(message.error_code, message.error_message)
        if not 1 <= num_prompt < self.max_model_len:
            return error(
                InvalidRequest.code,
                f"the prompt has {num_prompt} tokens; it must have at least 1 and leave room for one more within "
                f"scheduler.max_model_len ({self.max_model_len})",
            )
        if max_len > self.num_cache_tokens or max_len <= num_prompt:
            return error(
                InvalidRequest.code,
                f"the prompt has {num_prompt} tokens; with max_tokens ({message.params.max_tokens}) it does not fit "
                f"into the KV cache of {self.num_cache_tokens} tokens: lower max_tokens or raise cache.num_blocks "
                f"({self.num_blocks})",
            )
        if num_samples > self.max_num_waiting + self.max_num_seqs:
            return error(
                InvalidRequest.code,
                f"n ({num_samples}) is more than scheduler.max_num_seqs ({self.max_num_seqs}) and "
                f"scheduler.max_num_waiting ({self.max_num_waiting}) can ever hold",
            )
        if num_waiting + num_samples > self.max_num_waiting + num_free_rows:
            return error(
                QueueFull.code,
                f"{num_waiting} requests wait already; with this one (n = {num_samples}) there would be more than "
                f"scheduler.max_num_waiting ({self.max_num_waiting}) and free rows ({num_free_rows}) allow: try again "
                "later",
            )
        return None
