"""Configuration of the tokenizers: [tokenizer], their counters, and the bootstrap of each."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from ipc.records import StepShape
from workers.bootstrap import WorkerBootstrap

COUNTERS: Final = ("num_requests", "num_tokens", "num_rejected", "encode_ns", "num_prompt_records", "num_queries")


class TokenizerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The processes that turn prompts into token ids."""

    num_workers: Annotated[
        int, Meta(ge=1, le=64, description="Tokenizer processes. Each encodes one prompt at a time.")
    ] = 1
    chat_template: (
        Annotated[
            str,
            Meta(
                description="A file with a jinja2 chat template, which replaces all templates of the model. A relative "
                "path starts at the folder of the configuration file. Not set: the model's own templates."
            ),
        ]
        | None
    ) = None
    trust_request_templates: Annotated[
        bool,
        Meta(
            description="Whether a request may bring its own chat template. A template is a program: the engine bounds "
            "its time and memory, and runs it in jinja2's sandbox. Leave this off if you do not trust all clients."
        ),
    ] = False
    template_timeout_s: Annotated[
        float,
        Meta(
            gt=0,
            le=60,
            description="Processor time that rendering one chat may take. The engine then ends the request with an "
            "error. Other prompts of the same tokenizer process wait meanwhile.",
        ),
    ] = 1.0


class TokenizerBootstrap(msgspec.Struct, frozen=True, kw_only=True):
    """Rings: writes one `prompt` ring. Sockets: connects to `tokenize` and `schedule`."""

    worker: WorkerBootstrap
    tokenizer: TokenizerConfig
    model_path: str  # a folder
    shape: StepShape  # ids given by clients must be below its vocab_size
    cache_seed: bytes | None  # the run's, for names of KV blocks; None = prompts are not cached
