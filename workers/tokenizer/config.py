"""Configuration of the tokenizers: [tokenizer], and what each is given at birth."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from ipc.ring import RingHandle
from workers.process import WorkerBootstrap


class TokenizerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The processes that turn prompts into token ids."""

    num_workers: Annotated[
        int, Meta(ge=1, le=64, description="Tokenizer processes. Each encodes one prompt at a time.")
    ] = 1


class TokenizerBootstrap(msgspec.Struct, frozen=True, kw_only=True):
    worker: WorkerBootstrap
    model_path: str  # a folder
    vocab_size: int  # ids given by clients must be below it
    max_model_len: int
    prompt_ring: RingHandle
    block_size: int
    cache_seed: bytes | None  # the run's, for names of KV blocks; None = prompts are not cached
    ring_index: int  # of `prompt_ring` in admissions; 0 is the scheduler's
    tokenize_endpoint: str  # the gateway's ROUTER; connected here under this worker's role
    schedule_endpoint: str
