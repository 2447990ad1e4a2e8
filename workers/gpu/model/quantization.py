"""Chooses how quantised weights are read: by our own `formats`, or by transformers. Refuses all others.

transformers only warns of a quantization method that it does not know, and loads the numbers as they are stored: noise.
It loads the methods that it knows, but some of these need packages that are not installed. The files show other cases:
a tensor that the model has no place for may be the scale of another.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch import nn
from transformers.quantizers import AutoHfQuantizer

from ipc.errors import ConfigError, ModelUnsupported
from workers.gpu.memory.out_of_memory import is_out_of_memory
from workers.gpu.model.cache_format import CACHE_SCALE
from workers.gpu.model.formats.recognise import stored_formats
from workers.gpu.model.formats.stored_format import StoredFormat
from workers.gpu.model.weights import LoadReport

# Keys of config.json. transformers reads only the first.
_DECLARATIONS: Final = ("quantization_config", "compression_config")
# Switches of bitsandbytes. With both off, the weights are not quantised.
_SWITCHES: Final = ("load_in_8bit", "load_in_4bit")
_EXPORT: Final = "hf_quant_config.json"  # NVIDIA ModelOpt's own file; transformers does not read it
_CURE: Final = "use an unquantised checkpoint of the model"
_PACKAGE: Final = re.compile(r"pip install (?:-\S+ )*['\"`]?([A-Za-z][\w.-]*)")
_QUANTIZED: Final = re.compile(  # names of scales, zero points and packed weights, as the usual tools write them
    r"scale|zero_point|zeros|g_idx|qweight|weight_packed|weight_shape|absmax|quant_map|quant_state|SCB|weight_format"
    r"|codebook|_blocks$"
)
_CONSTANTS: Final = re.compile(  # constants that older versions stored and that the model now computes
    r"(^|\.)(rotary_emb\.(original_inv_freq|inv_freq|cos_cached|sin_cached)|(attn|attention)\.bias|masked_bias"
    r"|position_ids|embed_positions\.weights|decoder\.version)$"
)


def drop_empty_declarations(config: Any) -> None:
    """Remove quantization settings that are empty or switched off from a transformers configuration."""
    for each in (config, config.get_text_config()):
        if hasattr(each, _DECLARATIONS[0]) and _declared(each, _DECLARATIONS[0]) is None:
            del each.quantization_config


def check_quantization(
    path: str, folder: Path, config: Any, quantization: str = "none"
) -> tuple[Any, tuple[StoredFormat, ...]]:
    """Check what a model's configuration declares about quantization, before any weight is read.

    `config` is transformers'; `folder` holds the model's files; `quantization` is `model.quantization`. Returns the
    configuration to build the model from, and the formats of the weights that we read ourselves. Raises
    ModelUnsupported for quantised weights that cannot be loaded here, and ConfigError for weights that `quantization`
    would quantise again.
    """
    read, unread = (_declared(config, key) for key in _DECLARATIONS)
    if read is None and unread is None:
        algorithm = _exported_algorithm(folder / _EXPORT)
        if algorithm:
            raise ModelUnsupported(
                f"model.path ({path!r}): {_EXPORT} says that the weights are quantised ({algorithm}), which "
                f"transformers does not read: {_CURE}"
            )
        return config, ()
    formats = stored_formats(read or unread)
    if quantization != "none" and formats != ():
        raise ConfigError(
            f'model.quantization ("{quantization}"): the weights of model.path ({path!r}) are quantised already: leave '
            "it out"
        )
    if formats is not None:
        return _without_declaration(config), formats
    method = _method(read or unread)
    if method is None:
        raise ModelUnsupported(
            f"model.path ({path!r}): config.json says that the weights are quantised, but gives no quant_method that "
            f"transformers could read them with: {_CURE}"
        )
    if read is None or not isinstance(method, str) or not AutoHfQuantizer.supports_quant_method(read):
        raise ModelUnsupported(
            f"model.path ({path!r}): the weights are quantised (quant_method {method!r}), which "
            f"transformers {transformers.__version__} does not know and would load unscaled: {_CURE}"
        )
    with loading_quantized(path, config):
        quantizer = AutoHfQuantizer.from_config(copy.deepcopy(read), pre_quantized=True)
        quantizer.validate_environment(device_map=None, weights_only=True)
    return config, ()


@contextmanager
def loading_quantized(path: str, config: Any) -> Iterator[None]:
    """Turn any error of transformers on quantised weights into a ModelUnsupported of one line.

    Each method reports missing packages in its own way, or fails in the middle. The caller handles errors on other
    weights, lack of memory and errors of the device.
    """
    try:
        yield
    except Exception as error:
        declared = _declared(config, _DECLARATIONS[0])
        if declared is None or is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
            raise
        packages = list(dict.fromkeys(_PACKAGE.findall(str(error))))
        if isinstance(error, ModuleNotFoundError) and error.name:
            packages.append(error.name.partition(".")[0])
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        reason = f"it needs {' and '.join(packages)}, missing here or too old" if packages else first_line
        raise ModelUnsupported(
            f"model.path ({path!r}): the weights are quantised (quant_method {_method(declared)!r}), which "
            f"transformers cannot load: {reason}; or {_CURE}"
        ) from None


def check_tensors(path: str, config: Any, model: nn.Module, report: LoadReport) -> None:
    """Check the tensors that loading left over. Raises ModelUnsupported for those that may belong to the model.

    Ignores constants, scales of a KV cache, layers for multi-token prediction, and the parts that `config` (the whole
    configuration) has beside its text model.
    """
    ours = [name for name in report.unexpected if not _is_beside_the_model(name, config, model, report)]
    if ours:
        scales = [name for name in ours if _QUANTIZED.search(name)]
        named, others = (scales or ours)[0], len(scales or ours) - 1
        names = f"{named} and {others} more" if others else named
        if scales:
            raise ModelUnsupported(
                f"model.path ({path!r}): its files hold tensors of quantised weights ({names}), which transformers "
                f"would leave out, loading the weights unscaled: {_CURE}"
            )
        raise ModelUnsupported(
            f"model.path ({path!r}): its files hold tensors that the model has no place for ({names}): is config.json "
            "of the same model?"
        )
    if report.narrow and _declared(config, _DECLARATIONS[0]) is None:
        name, dtype = min(report.narrow.items())
        stored = str(dtype).removeprefix("torch.")
        raise ModelUnsupported(
            f"model.path ({path!r}): the weights are quantised ({name} is stored as {stored}), and "
            f"config.json does not say how: {_CURE}"
        )


def _without_declaration(config: Any) -> Any:
    """Return a copy of a transformers configuration that says nothing of quantization."""
    plain = copy.deepcopy(config)
    for each in (plain, plain.get_text_config()):
        if hasattr(each, _DECLARATIONS[0]):
            del each.quantization_config
    return plain


def _declared(config: Any, key: str) -> Any:
    """Return what a configuration, or its text configuration, declares under a quantization key; None if nothing."""
    declared = getattr(config, key, None) or getattr(config.get_text_config(), key, None)
    is_left_off = isinstance(declared, dict) and declared.keys() & _SWITCHES and not any(map(declared.get, _SWITCHES))
    return None if not declared or is_left_off else declared


def _method(declared: Any) -> Any:
    if not isinstance(declared, dict):
        return None
    if any(map(declared.get, _SWITCHES)):
        return "bitsandbytes"
    return declared.get("quant_method")


def _exported_algorithm(file: Path) -> str | None:
    """Return the weights' quantization in ModelOpt's file; None without the file, or if only the KV cache is
    quantised."""
    try:
        plain = json.loads(file.read_bytes())["quantization"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return "in a way that cannot be read"
    algorithm = plain.get("quant_algo") if isinstance(plain, dict) else plain
    return None if algorithm is None else str(algorithm)


def _is_beside_the_model(name: str, config: Any, model: nn.Module, report: LoadReport) -> bool:
    if _CONSTANTS.search(name) or CACHE_SCALE.search(name):
        return True
    text = config.get_text_config()
    num_layers, num_extra = (getattr(text, key, None) or 0 for key in ("num_hidden_layers", "num_nextn_predict_layers"))
    if any(f".layers.{num_layers + i}." in f".{name}" for i in range(num_extra)):
        return True
    if text is config:
        return False
    used = {part for each in (*report.read, *model.state_dict()) for part in _outer_parts(each)}
    return not used.issuperset(_outer_parts(name))


def _outer_parts(name: str) -> list[str]:
    """Return the names of a tensor's outermost module and of the next one: "model", "model.vision_tower"."""
    modules = name.split(".")[:-1]
    return [".".join(modules[: i + 1]) for i in range(min(2, len(modules)))]
