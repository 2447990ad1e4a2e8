"""Configuration of the tokenizers: [tokenizer], their counters, and the bootstrap of each."""

from __future__ import annotations

from typing import Final

import msgspec

from workers.bootstrap import WorkerBootstrap

COUNTERS: Final = ("num_requests", "num_tokens", "num_rejected", "encode_ns", "num_prompt_records")


class TokenizerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """[tokenizer].

    Args:
        num_workers: tokenizer processes; each encodes one prompt at a time.
    """

    num_workers: int = 1


class TokenizerBootstrap(msgspec.Struct, frozen=True, kw_only=True):
    """Rings: writes one `prompt` ring. Sockets: connects to `tokenize` and `schedule`."""

    worker: WorkerBootstrap
    model_path: str  # a folder
    vocab_size: int  # ids given by clients must be below it
    max_model_len: int
    block_size: int
    cache_seed: bytes | None  # the run's, for names of KV blocks; None = prompts are not cached
