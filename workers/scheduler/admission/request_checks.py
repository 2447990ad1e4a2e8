"""Whether the engine can ever serve a request, and how long its sequences may become.

Whether the queue has room for the request now is the waiting queue's question.
"""

from __future__ import annotations

from dataclasses import dataclass

from ipc.errors import InvalidRequest
from ipc.messages import Ended, Tokenized
from workers.scheduler.sequence import num_known_of


@dataclass(frozen=True)
class RequestChecks:
    """The engine's fixed sizes, and what they allow."""

    max_model_len: int
    block_size: int
    num_blocks: int
    max_num_waiting: int
    max_num_seqs: int

    @property
    def num_cache_tokens(self) -> int:
        return self.num_blocks * self.block_size

    def max_len(self, message: Tokenized) -> int:
        """Length in tokens, prompt and output, at which each sequence of the request ends."""
        max_tokens = message.params.max_tokens
        if max_tokens is None:
            return min(self.max_model_len, self.num_cache_tokens)
        return min(self.max_model_len, message.num_prompt_tokens + max_tokens)

    def refusal(self, message: Tokenized) -> Ended | None:
        """The error that ends a request which can never be served; None if it can be."""

        def error(code: str, text: str) -> Ended:
            return Ended(key=message.key, finish_reason="error", error_code=code, error_message=text)

        num_prompt, max_len = message.num_prompt_tokens, self.max_len(message)
        if message.error_code:
            return error(message.error_code, message.error_message)
        if not 1 <= num_prompt < self.max_model_len:
            return error(
                InvalidRequest.code,
                f"the prompt has {num_prompt} tokens; it must have at least 1 and leave room for one more within "
                f"scheduler.max_model_len ({self.max_model_len})",
            )
        if max_len > self.num_cache_tokens or max_len <= num_prompt:
            max_tokens = message.params.max_tokens
            asked, cure = (
                ("with one more", "shorten the prompt")
                if max_tokens is None
                else (f"with max_tokens ({max_tokens})", "lower max_tokens")
            )
            return error(
                InvalidRequest.code,
                f"the prompt has {num_prompt} tokens; {asked} it does not fit into the KV cache of "
                f"{self.num_cache_tokens} tokens: {cure} or raise cache.num_blocks ({self.num_blocks})",
            )
        num_known = num_known_of(message)
        if (longest := max(num_known)) >= max_len:
            return error(
                InvalidRequest.code,
                f"resume: the prompt ({num_prompt} tokens) and the {longest - num_prompt} tokens of a sample that has "
                f"not ended leave no room for one more within the {max_len} tokens that a sequence of this request may "
                "have: send the request without resume",
            )
        if len(num_known) > self.max_num_waiting + self.max_num_seqs:
            return error(
                InvalidRequest.code,
                f"n ({len(num_known)}) is more than scheduler.max_num_seqs ({self.max_num_seqs}) and "
                f"scheduler.max_num_waiting ({self.max_num_waiting}) together can hold: lower n",
            )
        return None
