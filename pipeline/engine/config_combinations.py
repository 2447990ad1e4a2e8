"""Combinations of configured values that are right one by one and cannot work together."""

from __future__ import annotations

from typing import Final

from ipc.errors import ConfigError
from pipeline.client.endpoint import is_private
from pipeline.http.config import HttpConfig
from workers.gateway.config import FrontendConfig
from workers.gpu.config import VARLEN_BLOCK_TOKENS, CacheConfig, ModelConfig
from workers.scheduler.config import SchedulerConfig

COMBINED: Final = (
    "scheduler.max_num_seqs", "scheduler.max_num_batched_tokens", "scheduler.max_model_len", "cache.num_blocks",
    "cache.block_size", "cache.dtype", "model.load_format", "model.null_step_ms", "model.attention", "http.tls_cert",
    "http.tls_key", "frontend.endpoint", "frontend.server_key_file", "frontend.client_keys_folder",
)  # fmt: skip


def check_combinations(
    *,
    scheduler: SchedulerConfig,
    cache: CacheConfig,
    model: ModelConfig,
    frontend: FrontendConfig,
    http: HttpConfig | None,
) -> None:
    """Raise ConfigError for values that are right one by one and cannot work together."""
    if scheduler.max_num_batched_tokens < scheduler.max_num_seqs:
        raise ConfigError(
            f"scheduler.max_num_batched_tokens ({scheduler.max_num_batched_tokens}) is smaller than "
            f"scheduler.max_num_seqs ({scheduler.max_num_seqs}): a full decode step would not fit; "
            "raise the first or lower the second"
        )
    if scheduler.max_model_len is not None and cache.num_blocks is not None:
        check_cache_holds_one_sequence(cache.num_blocks, cache.block_size, scheduler.max_model_len)
    if model.null_step_ms and model.load_format != "null":
        raise ConfigError(
            f"model.null_step_ms ({model.null_step_ms}) has no effect with model.load_format "
            f'("{model.load_format}"): leave it out, or set load_format = "null"'
        )
    if model.attention == "varlen" and cache.block_size % VARLEN_BLOCK_TOKENS:
        raise ConfigError(
            f'model.attention ("varlen") reads KV blocks of {VARLEN_BLOCK_TOKENS} tokens or a multiple of that, not of '
            f"cache.block_size ({cache.block_size}): set cache.block_size to {VARLEN_BLOCK_TOKENS}, or model.attention "
            'to "auto"'
        )
    if model.attention == "varlen" and cache.dtype != "auto":
        raise ConfigError(
            f'model.attention ("varlen") reads the KV cache in the model\'s own dtype, not as cache.dtype '
            f'("{cache.dtype}"): set model.attention or cache.dtype to "auto"'
        )
    if http is not None and (http.tls_cert is None) != (http.tls_key is None):
        given, missing = ("tls_cert", "tls_key") if http.tls_key is None else ("tls_key", "tls_cert")
        raise ConfigError(f"http.{given} is given without http.{missing}: HTTPS needs both")
    _check_frontend(frontend)


def _check_frontend(frontend: FrontendConfig) -> None:
    endpoint, names = frontend.endpoint, ("server_key_file", "client_keys_folder")
    given = [name for name in names if getattr(frontend, name) is not None]
    if len(given) == 1:
        missing = next(name for name in names if name not in given)
        raise ConfigError(f"frontend.{given[0]} is given without frontend.{missing}: `ringfeed keys` makes both")
    if given and (endpoint is None or endpoint.startswith("ipc:")):
        where = "not set" if endpoint is None else endpoint
        raise ConfigError(
            f"frontend.server_key_file has no effect with frontend.endpoint ({where}), a Unix socket of this user: "
            "set frontend.endpoint to a tcp:// address, or leave the keys out"
        )
    if endpoint is not None and not given and not is_private(endpoint):
        raise ConfigError(
            f"frontend.endpoint ({endpoint}) lets other machines connect, and there are no keys: run `ringfeed keys` "
            "and set frontend.server_key_file and frontend.client_keys_folder, or listen on 127.0.0.1"
        )


def check_cache_holds_one_sequence(num_blocks: int, block_size: int, max_model_len: int) -> None:
    """Raise ConfigError if the longest sequence could never be computed to its end."""
    if num_blocks * block_size < max_model_len:
        raise ConfigError(
            f"the KV cache (cache.num_blocks {num_blocks} x cache.block_size {block_size} = "
            f"{num_blocks * block_size} tokens) cannot hold one sequence of scheduler.max_model_len "
            f"({max_model_len}) tokens: lower max_model_len or give the cache more blocks"
        )
