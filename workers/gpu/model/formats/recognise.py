"""Chooses, from the quantization that config.json declares, the formats that we read ourselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from workers.gpu.model.formats.float8 import Float8
from workers.gpu.model.formats.stored_format import StoredFormat

_FLOAT8_FORMATS: Final = ("float-quantized", "naive-quantized")


def stored_formats(declared: Any) -> tuple[StoredFormat, ...]:
    """Return the formats of a checkpoint's weights, from its `quantization_config`; () for those that we do not read.

    A layer without quantised tensors is an ordinary one. So lists of layers that are left in 16 bits are not read.
    """
    method = declared.get("quant_method") if isinstance(declared, Mapping) else None
    recognise = _METHODS.get(method) if isinstance(method, str) else None
    try:
        return recognise(declared) if recognise else ()
    except (AttributeError, KeyError, TypeError, ValueError):  # values of other types than the format defines
        return ()


def _compressed_tensors(declared: Any) -> tuple[StoredFormat, ...]:
    formats: list[StoredFormat] = []
    groups = [group for group in declared["config_groups"].values() if group.get("weights")]
    named = [(group.get("format") or declared["format"], group["weights"]) for group in groups]
    float8 = [weights for name, weights in named if name in _FLOAT8_FORMATS and _is_float8(weights)]
    if float8:
        formats.append(Float8([_block(each["block_structure"]) for each in float8 if each.get("block_structure")]))
    return tuple(formats) if len(float8) == len(named) else ()


def _is_float8(weights: Any) -> bool:
    return bool(weights["type"] == "float" and weights["num_bits"] == 8)


def _float8(declared: Any) -> tuple[StoredFormat, ...]:
    block = declared.get("weight_block_size")
    return (Float8([_block(block)] if block else []),)


def _block(size: Any) -> tuple[int, int]:
    """Return a block's rows and columns; compressed-tensors writes also "128x128"."""
    rows, columns = size.split("x") if isinstance(size, str) else size
    return _positive(rows), _positive(columns)


def _positive(value: Any) -> int:
    if int(value) < 1:
        raise ValueError(value)
    return int(value)


_METHODS: Final[dict[str, Callable[[Any], tuple[StoredFormat, ...]]]] = {
    "compressed-tensors": _compressed_tensors,
    "fp8": _float8,
}
