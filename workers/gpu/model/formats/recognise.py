"""Chooses, from the quantization that config.json declares, the formats that we read ourselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from workers.gpu.model.formats.awq import Awq
from workers.gpu.model.formats.compressed_integers import CompressedIntegers
from workers.gpu.model.formats.float8 import Float8
from workers.gpu.model.formats.gptq import Gptq
from workers.gpu.model.formats.mxfp4 import Mxfp4
from workers.gpu.model.formats.stored_format import StoredFormat

Formats = tuple[StoredFormat, ...]

_FLOAT8_FORMATS: Final = ("float-quantized", "naive-quantized")
_BITS: Final = frozenset({4, 8})
_GPTQ_ZERO_OFFSETS: Final = {"gptq": 1, "gptq_v2": 0}  # the format subtracts it from its zero points
_AWQ_VERSIONS: Final = ("gemm", "exllama")  # the latter is repacked only when it is loaded


def stored_formats(declared: Any) -> Formats | None:
    """Return the formats of a checkpoint's weights, from its `quantization_config`; None if we do not read them.

    A layer without quantised tensors is an ordinary one. So the lists of layers that stay in 16 bits are not needed.
    """
    method = declared.get("quant_method") if isinstance(declared, Mapping) else None
    recognise = _METHODS.get(method) if isinstance(method, str) else None
    try:
        return recognise(declared) if recognise else None
    except (AttributeError, KeyError, TypeError, ValueError):  # values of other types than the format defines
        return None


def _compressed_tensors(declared: Any) -> Formats | None:
    """Each group of layers names its format, or has the checkpoint's. A group without weights quantises activations."""
    groups = [group for group in declared["config_groups"].values() if group.get("weights")]
    named = [(group.get("format") or declared["format"], group["weights"]) for group in groups]
    float8 = [weights for name, weights in named if name in _FLOAT8_FORMATS and _is_float8(weights)]
    integers = [weights for name, weights in named if name == "pack-quantized" and _is_integer(weights)]
    if len(float8) + len(integers) < len(named):
        return None
    formats: list[StoredFormat] = []
    if float8:
        formats.append(Float8([_block(each["block_structure"]) for each in float8 if each.get("block_structure")]))
    if integers:
        sizes = [_group_size(each.get("group_size") or -1) for each in integers]
        has_zero_points = not any(each.get("symmetric", True) for each in integers)
        formats.append(CompressedIntegers([each["num_bits"] for each in integers], sizes, has_zero_points))
    return tuple(formats)


def _gptq(declared: Any) -> Formats | None:
    """Settings in `dynamic` are of single layers: GPTQModel's extension."""
    version = declared.get("checkpoint_format") or declared.get("format") or "gptq"
    settings = [declared, *(each for each in (declared.get("dynamic") or {}).values() if each)]
    bits = [each["bits"] for each in settings if "bits" in each]
    sizes = [_group_size(each["group_size"]) for each in settings if "group_size" in each]
    if version not in _GPTQ_ZERO_OFFSETS or declared.get("is_marlin_format") or not _BITS.issuperset(bits):
        return None
    return (Gptq(bits, sizes, _GPTQ_ZERO_OFFSETS[version]),)


def _awq(declared: Any) -> Formats | None:
    version = declared.get("version") or declared.get("format") or "gemm"
    if version.lower() not in _AWQ_VERSIONS or declared.get("backend") == "llm-awq" or declared["bits"] != 4:
        return None
    return (Awq([_group_size(declared["group_size"])]),)


def _is_float8(weights: Any) -> bool:
    return (weights["type"], weights["num_bits"]) == ("float", 8)


def _is_integer(weights: Any) -> bool:
    return weights["type"] == "int" and weights["num_bits"] in _BITS


def _float8(declared: Any) -> Formats:
    block = declared.get("weight_block_size")
    return (Float8([_block(block)] if block else []),)


def _block(size: Any) -> tuple[int, int]:
    """Return a block's rows and columns; compressed-tensors writes also "128x128"."""
    rows, columns = size.split("x") if isinstance(size, str) else size
    return _positive(rows), _positive(columns)


def _group_size(size: Any) -> int:
    """Return the columns of a group; -1 if one group has them all."""
    return -1 if size == -1 else _positive(size)


def _positive(value: Any) -> int:
    if int(value) < 1:
        raise ValueError(value)
    return int(value)


_METHODS: Final[dict[str, Callable[[Any], Formats | None]]] = {
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "fp8": _float8,
    "gptq": _gptq,
    "mxfp4": lambda _: (Mxfp4(),),
}
