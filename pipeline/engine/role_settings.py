"""Makes each role's bootstrap from the configuration.

`pipeline/engine/topology.py` names these functions in its table and gives them the worker's part in rings and sockets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import msgspec

from ipc.records import PROMPT_RECORD_TOKENS, StepShape
from pipeline.client.endpoint import own_folder
from pipeline.engine.config import Config
from pipeline.engine.model_files import ServedModel
from pipeline.http.config import HttpBootstrap, HttpConfig
from workers.bootstrap import WorkerBootstrap
from workers.detokenizer.config import DetokenizerBootstrap
from workers.gateway.config import GatewayBootstrap
from workers.gpu.config import GpuBootstrap
from workers.grammar.config import GrammarBootstrap
from workers.queueing.config import PolicyConfig
from workers.scheduler.config import GrammarLimits, SchedulerBootstrap
from workers.tokenizer.config import TokenizerBootstrap

# Prompts under way to one tokenizer: enough to keep it busy, and at most about 40 ms of work, because the policy cannot
# reorder them any more. A longer prompt goes alone.
TOKENIZER_WINDOW: Final = 8
TOKENIZER_WINDOW_BYTES: Final = 64 << 10
CLIENT_WINDOW: Final = 64  # at 4 ms a step, a client may read nothing for 0.25 s before its deltas coalesce
MIN_PROMPT_RECORDS: Final = 64


@dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """What is settled about one engine before any of its processes runs.

    Args:
        local_endpoint: a Unix socket where clients of this user need no keys; `endpoint` itself if that is one.
        cache_seed: the root of the names of its KV blocks; None = prompts are not cached.
        lent: descriptors of the launcher that a role may keep open (`Role.keeps`), by name.
        num_blocks: KV blocks of the first start of the GPU process; None = this is the first.
        device_bytes: bytes of the device that the first start took.
        record_limit_bytes: of the recording, if its file is among `lent`.
    """

    config: Config
    model: ServedModel
    endpoint: str
    local_endpoint: str
    launcher_pid: int
    log_level: str = "INFO"
    traced: bool = False
    cache_seed: bytes | None = None
    lent: Mapping[str, int]
    num_blocks: int | None = None
    device_bytes: int = 0
    record_limit_bytes: int = 0

    @cached_property
    def shape(self) -> StepShape:
        scheduler = self.config.scheduler
        return StepShape(
            max_num_seqs=scheduler.max_num_seqs,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            max_model_len=self.model.max_model_len,
            block_size=self.config.cache.block_size,
            vocab_size=self.model.vocab_size,
            num_grammar_workers=self.config.grammar.num_workers,
        )

    @property
    def num_step_records(self) -> int:
        """Of the rings that carry steps, results and masks: a record is never overwritten before it is read."""
        return 2 * self.config.ring.depth

    @property
    def num_prompt_records(self) -> int:
        """Of one prompt ring: room for two of the longest prompts."""
        longest = -(-self.model.max_model_len // PROMPT_RECORD_TOKENS)
        return max(MIN_PROMPT_RECORDS, 2 * longest)


def gateway(facts: EngineFacts, worker: WorkerBootstrap) -> GatewayBootstrap:
    scheduler, folder = facts.config.scheduler, own_folder(facts.endpoint)
    server = facts.config.http or HttpConfig()
    if facts.local_endpoint != facts.endpoint:
        folder = Path(facts.local_endpoint.removeprefix("ipc://")).parent
    return GatewayBootstrap(
        worker=worker,
        frontend=facts.config.frontend,
        endpoint=facts.endpoint,
        local_endpoint=facts.local_endpoint,
        endpoint_folder=None if folder is None else str(folder),
        model_name=facts.model.name,
        model_folder=facts.model.folder,
        chat_template=facts.config.tokenizer.chat_template,
        served_model_names=server.served_model_names,
        tool_parser=server.tool_parser,
        reasoning_parser=server.reasoning_parser,
        max_model_len=facts.model.max_model_len,
        policy=PolicyConfig(**{name: getattr(scheduler, name) for name in PolicyConfig.__struct_fields__}),
        tokenizer_window=TOKENIZER_WINDOW,
        tokenizer_window_bytes=TOKENIZER_WINDOW_BYTES,
        client_window=CLIENT_WINDOW,
    )


def tokenizer(facts: EngineFacts, worker: WorkerBootstrap) -> TokenizerBootstrap:
    return TokenizerBootstrap(
        worker=worker,
        tokenizer=facts.config.tokenizer,
        model_path=facts.model.folder,
        shape=facts.shape,
        cache_seed=facts.cache_seed,
    )


def detokenizer(facts: EngineFacts, worker: WorkerBootstrap) -> DetokenizerBootstrap:
    return DetokenizerBootstrap(worker=worker, model_path=facts.model.folder, client_window=CLIENT_WINDOW)


def scheduler(facts: EngineFacts, worker: WorkerBootstrap) -> SchedulerBootstrap:
    return SchedulerBootstrap(
        worker=worker,
        scheduler=msgspec.structs.replace(facts.config.scheduler, max_model_len=facts.model.max_model_len),
        shape=facts.shape,
        depth=facts.config.ring.depth,
        eos_token_ids=facts.model.eos_token_ids,
        grammar=GrammarLimits(
            mask_timeout_s=facts.config.grammar.mask_timeout_s, compile_timeout_s=facts.config.grammar.compile_timeout_s
        ),
        restart_window_s=facts.config.supervisor.window_s,
    )


def grammar(facts: EngineFacts, worker: WorkerBootstrap) -> GrammarBootstrap:
    return GrammarBootstrap(
        worker=worker,
        model_path=facts.model.folder,
        shape=facts.shape,
        compile_timeout_s=facts.config.grammar.compile_timeout_s,
    )


def gpu(facts: EngineFacts, worker: WorkerBootstrap) -> GpuBootstrap:
    return GpuBootstrap(
        worker=worker,
        model=msgspec.structs.replace(facts.config.model, path=facts.model.folder),
        cache=facts.config.cache,
        shape=facts.shape,
        depth=facts.config.ring.depth,
        mask_timeout_s=facts.config.grammar.mask_timeout_s,
        num_blocks=facts.num_blocks,
        device_bytes=facts.device_bytes,
        record_limit_bytes=facts.record_limit_bytes,
    )


def http(facts: EngineFacts, worker: WorkerBootstrap) -> HttpBootstrap:
    assert facts.config.http is not None, "without the section there is no process of this role"
    return HttpBootstrap(
        worker=worker,
        http=facts.config.http,
        endpoint=facts.local_endpoint,
        model_name=facts.model.name,
        model_folder=facts.model.folder,
        chat_template=facts.config.tokenizer.chat_template,
        max_model_len=facts.model.max_model_len,
        policy=facts.config.scheduler.policy,
        drain_timeout_s=facts.config.frontend.drain_timeout_s,
    )
