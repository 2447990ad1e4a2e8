"""Finds the model's folder and reads the facts that the engine needs, before any process is started.

Reads JSON and checks that files exist. Loads neither weights nor tokenizer, and imports neither torch nor transformers.
If the JSON leaves values to transformers' defaults, it starts a process that asks transformers.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import logging
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import msgspec

from ipc.errors import ConfigError
from ipc.records import MAX_EOS_TOKEN_IDS
from pipeline.engine.config import Config
from pipeline.engine.config_combinations import check_cache_holds_one_sequence
from pipeline.environment.module_search import module_command, module_environment
from workers.gpu.model.max_length import num_positions, unfit_rope_value
from workers.gpu.model.weight_files import check_pointers, other_contents, weight_files
from workers.scheduler.config import MAX_MODEL_LEN

logger = logging.getLogger(__name__)

_HUB_ID: Final = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILES: Final = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"]
_SIZES: Final = (  # sizes of a transformer, under the names of all families
    "vocab_size", "hidden_size", "n_embd", "intermediate_size", "n_inner", "head_dim", "num_hidden_layers", "n_layer",
    "num_attention_heads", "n_head", "num_key_value_heads", "max_position_embeddings", "n_positions",
    "max_seq_len", "seq_length", "n_ctx",
)  # fmt: skip
_MAX_SIZE: Final = 2**31 - 1  # token ids are 32 bits wide, and every other size is far smaller
_READ_FILES: Final = (  # the beginnings of files' names; model/weight_files.py chooses the weights
    "config.json", "generation_config.json", "hf_quant_config.json", "tokenizer", "vocab", "merges", "spiece",
    "sentencepiece", "tekken", "tiktoken", "special_tokens_map", "added_tokens", "chat_template",
)  # fmt: skip
_SLOW_TOKENIZER_FILES: Final = (  # files from which transformers builds a tokenizer
    "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
    "tiktoken.model",
)  # fmt: skip


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """The facts about a model that the launcher passes to the workers."""

    name: str  # as in the configuration
    folder: str
    vocab_size: int
    eos_token_ids: list[int]
    max_model_len: int  # prompt + output tokens of one sequence: the configured number, or the model's limit


class ModelNotHere(ConfigError):
    """The files of a hub id are not on this machine."""


def find_model(config: Config, *, download: bool = True) -> ServedModel:
    """Resolve `model.path` to a folder and read its facts.

    A hub id is searched in the local Hugging Face cache and then, with `download`, on the hub. Raises ConfigError
    (ModelNotHere for files that `download` might get), naming the key, the value and the cure.
    """
    try:
        return _find_model(config, download)
    except OSError as error:
        if error.filename is None:
            raise
        raise ConfigError(f"model.path: {error.filename!r} cannot be read: {error.strerror}") from None


def _find_model(config: Config, download: bool) -> ServedModel:
    path = config.model.path
    folder = Path(path) if path.startswith("/") else _hub_folder(path, config.model.load_format, download)
    if folder.is_file():
        raise ConfigError(f"model.path ({path!r}) is a file: give the folder of a model with weights as safetensors")
    if not folder.is_dir():
        raise ConfigError(
            f"model.path ({path!r}): there is no such folder; relative ones start at the config file's, with --set "
            "or --model at the current one"
        )
    if not (folder / "config.json").exists() and (cure := other_contents(folder)) is not None:
        raise ConfigError(f"model.path ({path!r}): {folder} has no config.json: {cure}")
    _check_pointers(folder)
    plain = _read_json(folder / "config.json", path)
    text = plain.get("text_config") or plain
    if not isinstance(text, dict):
        raise ConfigError(f"model.path ({path!r}): text_config ({text!r}) in config.json must be an object")
    generation = _read_json(folder / "generation_config.json", path, optional=True)
    _check_sizes(text, path)
    _check_tokenizer(folder, path)
    reads_weights = config.model.load_format == "safetensors"
    if reads_weights:
        weight_files(folder)
    sources = [generation, text, plain]
    if ("model_type" in plain and _is_incomplete(config, text)) or (
        reads_weights and _is_quantized(folder, plain, text)
    ):
        text = _text_config_of_transformers(folder, path)
        _check_sizes(text, path)
        sources.append(text)
    vocab_size = text.get("vocab_size")
    if vocab_size is None:
        raise ConfigError(f"model.path ({path!r}): config.json gives no vocab_size; is it a language model?")
    facts = ServedModel(
        name=Path(path).name if path.startswith("/") else path,
        folder=str(folder),
        vocab_size=vocab_size,
        eos_token_ids=_eos_token_ids(sources, path),
        max_model_len=_max_model_len(config, text),
    )
    if config.cache.num_blocks is not None:
        check_cache_holds_one_sequence(config.cache.num_blocks, config.cache.block_size, facts.max_model_len)
    return facts


def check_device(device: str) -> None:
    """Raise ConfigError if the configuration requires CUDA and this machine has no usable CUDA GPU."""
    if device == "cuda" and (reason := _cuda_missing()):
        raise ConfigError(f'model.device ("cuda"): {reason}; set model.device = "cpu" or use a machine with a CUDA GPU')


def _cuda_missing() -> str | None:
    """Return the reason why CUDA cannot be used, or None. Asks the driver, because importing torch takes seconds."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no CUDA driver is installed here (libcuda.so.1)"
    if status := driver.cuInit(0):
        return f"the CUDA driver does not start (cuInit: error {status})"
    count = ctypes.c_int(0)
    if driver.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0:
        return "the CUDA driver sees no GPU"
    return None


def _hub_folder(hub_id: str, load_format: str, download: bool) -> Path:
    if not _HUB_ID.fullmatch(hub_id):
        raise ConfigError(f"model.path ({hub_id!r}) is neither a folder nor a hub id (organization/name)")
    import huggingface_hub  # takes half a second, so only hub ids pay for it
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = [p for p in _HUB_FILES if load_format == "safetensors" or p != "*.safetensors"]
    missing = f"model.path ({hub_id!r}) is neither a folder nor in the local Hugging Face cache"
    try:
        folder = Path(huggingface_hub.snapshot_download(hub_id, local_files_only=True, allow_patterns=patterns))
        if (folder / "config.json").is_file():
            return folder
    except (LocalEntryNotFoundError, ValueError):
        pass  # not in the cache
    if not download:
        raise ModelNotHere(missing)
    logger.info("downloading %s from the Hugging Face hub", hub_id)
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns, etag_timeout=5))
    except Exception as error:  # errors of the hub client, the HTTP library and the system
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelNotHere(
            f"{missing}, and cannot be downloaded ({first_line}): "
            "give the path of a folder (a relative one starts at the config file's folder, with --set or --model at "
            "the current one), or log in with a token that may read it (hf auth login)"
        ) from None


def _read_json(file: Path, path: str, *, optional: bool = False) -> dict[str, Any]:
    try:
        plain = json.loads(file.read_bytes())
    except FileNotFoundError:
        if optional:
            return {}
        raise ConfigError(f"model.path ({path!r}): {file.parent} has no {file.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"model.path ({path!r}): {file} cannot be read: {error}") from None
    if not isinstance(plain, dict):
        raise ConfigError(f"model.path ({path!r}): {file} must hold a JSON object")
    return plain


def _check_sizes(text_config: dict[str, Any], path: str) -> None:
    """Raise ConfigError for impossible sizes. transformers would build such models, or fail with an unclear error."""
    for key in _SIZES:
        value = text_config.get(key)
        if value is None or (
            isinstance(value, list) and key != "vocab_size"
        ):  # some families have one value for each layer
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MAX_SIZE:
            raise ConfigError(
                f"model.path ({path!r}): {key} ({value!r}) in config.json must be an integer from 1 to {_MAX_SIZE}"
            )
    if (unfit := unfit_rope_value(text_config)) is not None:
        key, value = unfit
        raise ConfigError(
            f"model.path ({path!r}): {key} ({value!r}) of RoPE in config.json must be a number above 0 and at most "
            f"{_MAX_SIZE}"
        )


def _check_tokenizer(folder: Path, path: str) -> None:
    files = [file for name in ("tokenizer.json", *_SLOW_TOKENIZER_FILES) if (file := folder / name).is_file()]
    if not files:
        raise ConfigError(f"model.path ({path!r}): {folder} has no tokenizer: put the model's tokenizer.json there")
    if all(file.suffix == ".model" for file in files):
        # A SentencePiece model is a protobuf message that begins with its pieces; tiktoken's files are lines of text.
        file = files[0]
        packages = ("sentencepiece", "protobuf") if file.read_bytes().startswith(b"\n") else ("tiktoken",)
        if missing := [package for package in packages if not _is_installed(package)]:
            raise ConfigError(
                f"model.path ({path!r}): {folder} has no tokenizer.json, and reading its {file.name} needs packages "
                f"that are not installed: pip install {' '.join(missing)}, or save a tokenizer.json with transformers"
            )


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _check_pointers(folder: Path) -> None:
    """Raise ConfigError if a file is only a Git LFS pointer. `weight_files` checks the weights themselves."""
    check_pointers(file for file in sorted(folder.iterdir()) if file.name.startswith(_READ_FILES))


def _is_quantized(folder: Path, *configs: dict[str, Any]) -> bool:
    keys = ("quantization_config", "compression_config")
    return (folder / "hf_quant_config.json").exists() or any(config.get(key) for config in configs for key in keys)


def _is_incomplete(config: Config, text_config: dict[str, Any]) -> bool:
    """Return whether the configuration needs transformers' defaults, or its way to apply a RoPE factor."""
    length = num_positions(text_config)
    if text_config.get("vocab_size") is None or (length is None and config.scheduler.max_model_len is None):
        return True
    return length != num_positions({**text_config, "rope_parameters": None, "rope_scaling": None})


def _text_config_of_transformers(folder: Path, path: str) -> dict[str, Any]:
    """Return the text model's configuration as transformers reads it, in a separate process. Takes some seconds."""
    done = subprocess.run(
        module_command("workers.gpu.model.describe", str(folder)), env=module_environment(), stdin=subprocess.DEVNULL,
        capture_output=True, text=True,
    )  # fmt: skip
    try:
        described = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last_line = next(iter(reversed(done.stderr.strip().splitlines())), f"exit status {done.returncode}")
        raise ConfigError(f"model.path ({path!r}): transformers cannot read config.json: {last_line}") from None
    if "error" in described:
        raise ConfigError(described["error"])
    text_config: dict[str, Any] = described["text_config"]
    return text_config


def _eos_token_ids(sources: Iterable[dict[str, Any]], path: str) -> list[int]:
    """Return the ids that end a sequence, from the first source that names any, as in `model.generate`."""
    for source in sources:
        value = source.get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i <= _MAX_SIZE for i in ids):
            raise ConfigError(f"model.path ({path!r}): eos_token_id ({value!r}) must be a token id or a list of them")
        if len(ids) > MAX_EOS_TOKEN_IDS:
            raise ConfigError(
                f"model.path ({path!r}): eos_token_id lists {len(ids)} ids; at most {MAX_EOS_TOKEN_IDS} are supported"
            )
        return [i for i in ids if i >= 0]
    return []


def _max_model_len(config: Config, text_config: dict[str, Any]) -> int:
    configured = config.scheduler.max_model_len
    possible = num_positions(text_config)
    if configured is None:
        if possible is None:
            raise ConfigError(
                "scheduler.max_model_len is missing, and the model's config.json gives no max_position_embeddings: "
                "set it to the most tokens (prompt + output) of one sequence"
            )
        if possible > MAX_MODEL_LEN:
            raise ConfigError(
                f"scheduler.max_model_len is missing, and the model's config.json gives {possible} positions, more "
                f"than any sequence can have: set it to {MAX_MODEL_LEN} or less"
            )
        return possible
    if possible is not None and configured > possible:
        raise ConfigError(
            f"scheduler.max_model_len ({configured}) is larger than the model allows "
            f"({possible} positions): lower it, or leave it out"
        )
    return configured
