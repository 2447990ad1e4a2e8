"""Loads a model of transformers and makes it ready to run: weights, gate, KV cache, attention backend.

Reads a local folder or the local hub cache, never the network, and never a pickle.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from ipc.errors import ConfigError, ModelUnsupported, RingfeedError
from ipc.records import StepShape
from workers.gpu.attention.backend import make_backend
from workers.gpu.config import CacheConfig, ModelConfig
from workers.gpu.memory.account import MemoryUse, model_bytes, reserved_bytes
from workers.gpu.memory.kv_cache import KVCache, choose_num_blocks
from workers.gpu.memory.out_of_memory import is_out_of_memory
from workers.gpu.model.cache_format import check_cache_dtype, choose_cache_format
from workers.gpu.model.compile import compile_layers
from workers.gpu.model.formats.stored_format import StoredFormat
from workers.gpu.model.fusion import find_projections, fuse_projections
from workers.gpu.model.gate import check_config, is_near, prepare_model, probe_logits, probe_model
from workers.gpu.model.linear_layers import tune_products, use_products
from workers.gpu.model.paged_runner import PagedModelRunner
from workers.gpu.model.probed_model import ProbedModel
from workers.gpu.model.quantization import check_quantization, check_tensors, drop_empty_declarations, loading_quantized
from workers.gpu.model.step_memory import find_wait, largest_step, measure_step_bytes
from workers.gpu.model.weights import Progress, files_to_read, make_blank, read_weights
from workers.gpu.products.multiply import Shape
from workers.gpu.startup_stages import LOADING

logger = logging.getLogger(__name__)

_DUMMY_SEED: Final = 0
_LOCAL_ONLY: Final[dict[str, Any]] = {"local_files_only": True, "trust_remote_code": False}


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready for its first step."""

    runner: PagedModelRunner
    num_blocks: int  # blocks that sequences can hold; the cache has one more, the last: the trash block
    memory: MemoryUse
    can_be_captured: bool  # in a graph, because no step reads the device's values on the host


def load_model(
    config: ModelConfig, cache: CacheConfig, shape: StepShape, device: torch.device, progress: Progress
) -> LoadedModel:
    """Load the model of `config` onto `device`, with load_format "safetensors" or "dummy".

    Raises ConfigError for a folder, length or cache that cannot work, and ModelUnsupported for a model that would
    compute wrong results. Silences transformers' own output for the rest of the process.

        configuration > weights > gate > fused projections > products > compiled layers > tuning > KV cache
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)

    backend = make_backend(config.attention, device)
    check_cache_dtype(cache, device)
    progress("reading config.json", 0.0)
    model_config = load_config(config.path)
    check_config(model_config, shape.max_model_len)
    model = load_weights(config, model_config, device, progress)

    progress("checking the model", 0.0)
    with _blaming_config(config.path, model_config):
        prepare_model(model, shape.max_model_len)
        facts = probe_model(model, shape.max_model_len, device)
    backend.check(facts)
    fuse(model, facts, shape.max_model_len, device)
    progress("checking the model", 1.0)
    products = use_products(
        model, config, facts.cache_dtype, device, lambda: probe_logits(model, shape.max_model_len, device)
    )

    stored = choose_cache_format(facts, cache, config.path, files_to_read(config))
    step = largest_step(model, stored, shape, device, backend)
    gated: Collection[Shape] = ()
    if config.compile == "on" or (config.compile == "auto" and device.type == "cuda"):
        progress("compiling the model", 0.0)
        gated = compile_layers(model, step) or ()
        progress("compiling the model", 1.0)
    tune_products(model, products, gated, facts.cache_dtype, shape.max_num_batched_tokens, device, progress)

    progress("measuring the largest step", 0.0)
    step_bytes = measure_step_bytes(step, device, shape)
    wait = find_wait(step, device)
    if wait is not None:
        logger.warning("the model waits for the device in each step, which cannot be captured in a graph: %s", wait)
    captures = wait is None and not backend.needs_host_lengths
    progress("allocating the KV cache", 0.0)
    left_bytes = reserved_bytes(
        shape, len(facts.layers), facts.vocab_size, step_bytes, device, captures=captures, row_states=facts.row_states
    )
    num_blocks = choose_num_blocks(stored.layers, cache, shape, stored.cache_dtype, device, left_bytes)
    kv_cache = KVCache(stored.layers, num_blocks, shape.block_size, stored.cache_dtype, device, stored.kv_scales)
    progress("allocating the KV cache", 1.0)
    logger.info(
        "%s: %d layers, %s, %d KV blocks of %d tokens", config.path, len(facts.layers), model.dtype, num_blocks,
        shape.block_size,
    )  # fmt: skip
    memory = MemoryUse(weights=model_bytes(model), largest_step=step_bytes, kv_blocks=kv_cache.num_bytes)
    return LoadedModel(PagedModelRunner(model, kv_cache, backend, facts), num_blocks, memory, captures)


def fuse(model: nn.Module, facts: ProbedModel, max_model_len: int, device: torch.device) -> None:
    """Fuse a checked model's projections, unless that changes its logits."""
    expected: list[torch.Tensor] = []
    groups = find_projections(model, lambda: expected.append(probe_logits(model, max_model_len, device)))
    undo = fuse_projections(groups)
    try:
        is_same = is_near(probe_logits(model, max_model_len, device), expected[0], facts.cache_dtype)
    except (AttributeError, KeyError, RuntimeError) as error:  # the model accesses its layers in another way
        if is_out_of_memory(error):
            raise
        logger.debug("fused projections fail: %r", error)
        is_same = False
    if not is_same:
        undo()
        logger.warning("the model runs without fused projections, because they change its results")


def load_config(path: str) -> Any:
    """Return the model's configuration as transformers reads it. Raises ConfigError or ModelUnsupported."""
    with _blaming_config(path):
        try:
            plain, _ = PreTrainedConfig.get_config_dict(path, **_LOCAL_ONLY)
            _check_model_type(path, plain)
            _check_dtype(path, plain)
            config = AutoConfig.from_pretrained(path, **_LOCAL_ONLY)
            drop_empty_declarations(config)
            return config
        except OSError as error:
            raise ConfigError(
                f"model.path ({path!r}) is neither a folder with a config.json nor a hub id in the local cache: "
                f"{_one_line(error)}"
            ) from None


def _check_model_type(path: str, plain: dict[str, Any]) -> None:
    """Raise ModelUnsupported for an unknown model_type. transformers' own message is long, and its advice does not help
    here."""
    model_type = plain.get("model_type")
    if model_type is None or model_type in CONFIG_MAPPING:
        return
    if "auto_map" in plain:
        raise ModelUnsupported(
            f"model.path ({path!r}): model_type {model_type!r} in config.json needs Python code from its own "
            "repository, which ringfeed never runs: use a model that transformers itself implements"
        )
    raise ModelUnsupported(
        f"model.path ({path!r}): transformers {transformers.__version__} does not know model_type {model_type!r} in "
        "config.json: a later version may"
    )


def _check_dtype(path: str, plain: dict[str, Any]) -> None:
    """Raise ModelUnsupported for an unusable dtype. transformers does not check the name, and fails later."""
    text = plain.get("text_config")
    for each in (plain, text if isinstance(text, dict) else {}):
        name = each.get("dtype") or each.get("torch_dtype")
        if not isinstance(name, str):
            continue
        dtype = getattr(torch, name, None)
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
            raise ModelUnsupported(
                f"model.path ({path!r}): dtype ({name!r}) in config.json is not one that models compute in: change "
                "it to bfloat16, float16 or float32"
            )


def load_weights(config: ModelConfig, model_config: Any, device: torch.device, progress: Progress) -> nn.Module:
    """Return transformers' own model with the weights of `config`, ready to run and not yet changed by us.

    Raises ConfigError or ModelUnsupported.
    """
    files = files_to_read(config)
    formats: Sequence[StoredFormat] = ()
    if files:
        model_config, formats = check_quantization(config.path, files[0].parent, model_config, config.quantization)
    with _blaming_config(config.path, model_config):  # covers this line only, not errors of the weights
        blank = make_blank(model_config)
    progress(LOADING, 0.0)
    if files:
        model = _read_weights(config, files, formats, model_config, blank, device, progress)
    else:
        model = _random_weights(config, model_config, device)
    model.eval().requires_grad_(False)
    progress(LOADING, 1.0)
    return model


def _read_weights(
    config: ModelConfig, files: list[Path], formats: Sequence[StoredFormat], model_config: Any, blank: nn.Module,
    device: torch.device, progress: Progress,
) -> nn.Module:  # fmt: skip
    unreadable = f"the weights of model.path ({config.path!r}) cannot be read"
    try:
        with loading_quantized(config.path, model_config):
            model, report = read_weights(files, blank, config.dtype, device, progress, formats)
    except ModelUnsupported:
        raise
    except ValueError as error:
        raise ModelUnsupported(f"model.path ({config.path!r}): {_one_line(error)}") from None
    except (OSError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise ConfigError(f"{unreadable}: {_one_line(error)}") from None
    check_tensors(config.path, model_config, model, report)
    if report.mismatched:
        name, stored, wanted = report.mismatched[0]
        raise ConfigError(
            f"{unreadable}: {name} is {stored} in the files and {wanted} in the model: is config.json of the same "
            "model?"
        )
    if report.missing:  # transformers would continue with random ones
        lacks = f"lacks {len(report.missing)} of the model's weights, {report.missing[0]} among them"
        raise ConfigError(f"model.path ({config.path!r}) {lacks}")
    return model


def _random_weights(config: ModelConfig, model_config: Any, device: torch.device) -> nn.Module:
    declared = model_config.get_text_config().dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"), device:
        torch.manual_seed(_DUMMY_SEED)
        model: nn.Module = AutoModelForCausalLM.from_config(
            model_config, dtype=declared or torch.float32, trust_remote_code=False
        )
    return model


@contextmanager
def _blaming_config(path: str, model_config: Any = None) -> Iterator[None]:
    """Turn errors of transformers in this block, which come of bad values in config.json, into a ModelUnsupported of
    one line.

    transformers checks few of these values. The others fail where they are used, with any type of error.
    """
    try:
        yield
    except RingfeedError:
        raise
    except Exception as error:
        if is_out_of_memory(error) or _is_of_the_device(error):
            raise
        logger.debug("config.json makes transformers fail", exc_info=True)
        raise ModelUnsupported(f"model.path ({path!r}): config.json: {_fault(error, model_config)}") from None


def _is_of_the_device(error: Exception) -> bool:
    """Return whether the device itself failed. Libraries report that as a plain RuntimeError."""
    if isinstance(error, torch.AcceleratorError):
        return True
    return isinstance(error, RuntimeError) and any(name in str(error) for name in ("CUDA error", "CUDNN_STATUS"))


def _fault(error: Exception, model_config: Any) -> str:
    if isinstance(error, ValueError | StrictDataclassError):  # written for the author of the configuration
        return _one_line(error)
    if isinstance(error, KeyError) and model_config is not None and isinstance(error.args[0], str):
        value = error.args[0]
        names = list(_names_of(value, model_config.get_text_config().to_dict()))
        if names:
            return f"{' or '.join(names)} ({value!r}) is not known to transformers"
    return f"transformers cannot build a model from its values ({type(error).__name__}: {_one_line(error)})"


def _names_of(value: object, fields: dict[str, Any]) -> Iterator[str]:
    for name, each in fields.items():
        if isinstance(each, dict):
            yield from (f"{name}.{inner}" for inner in _names_of(value, each))
        elif each == value:
            yield name


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
