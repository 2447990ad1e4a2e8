"""Configuration of the tokenizers: [tokenizer], their counters, and the bootstrap of each."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from ipc.records import StepShape
from workers.bootstrap import WorkerBootstrap

COUNTERS: Final = ("num_requests", "num_tokens", "num_rejected", "encode_ns", "num_prompt_records")


class TokenizerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The processes that turn prompts into token ids."""

    num_workers: Annotated[
        int, Meta(ge=1, le=64, description="Tokenizer processes. Each encodes one prompt at a time.")
    ] = 1


class TokenizerBootstrap(msgspec.Struct, frozen=True, kw_only=True):
    """Rings: writes one `prompt` ring. Sockets: connects to `tokenize` and `schedule`."""

    worker: WorkerBootstrap
    model_path: str  # a folder
    shape: StepShape  # ids given by clients must be below its vocab_size
    cache_seed: bytes | None  # the run's, for names of KV blocks; None = prompts are not cached
