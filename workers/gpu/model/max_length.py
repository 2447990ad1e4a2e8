"""Reads the maximum sequence length from a model's configuration. Uses neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

_LENGTH_KEYS: Final = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
_ROPE_KEYS: Final = ("factor", "original_max_position_embeddings")
_MAX_NUMBER: Final = 2**31 - 1
# RoPE types whose factor extends the length. Other types vary with the length, or the declared length includes the
# factor.
_STRETCHED: Final = ("linear", "yarn", "llama3")


def num_positions(text_config: Mapping[str, Any]) -> int | None:
    """Return the larger of the declared length and the length that a RoPE factor gives; None if no length is declared.

    A factor multiplies the length that the model was trained for: `original_max_position_embeddings`, or else the
    declared length. In some models the declared length includes the factor, in others it does not. If layers have
    different RoPE settings, the smallest result counts.
    """
    known = (text_config.get(key) for key in _LENGTH_KEYS)
    length = next((value for value in known if isinstance(value, int) and value >= 1), None)
    if length is None:
        return None
    return max(length, min((_stretched(rope, length) for rope in _ropes(text_config)), default=length))


def unfit_rope_value(text_config: Mapping[str, Any]) -> tuple[str, Any] | None:
    """Return a key of RoPE's scaling and its value if the value is unusable (0, a string, infinity); None if all are
    usable.

    Some of these make transformers fail with an unclear error, and others make every logit NaN.
    """
    for rope in _ropes(text_config):
        if _type(rope) in (None, "default"):
            continue  # these types read neither key
        for key in _ROPE_KEYS:
            value = rope.get(key)
            if value is not None and _number(value) is None:
                return key, value
    return None


def _ropes(text_config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    declared = text_config.get("rope_scaling") or text_config.get("rope_parameters")  # in transformers' order
    if not isinstance(declared, Mapping):
        return
    by_layer_type = [each for each in declared.values() if isinstance(each, Mapping)]
    yield from by_layer_type or [declared]


def _type(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type"))


def _stretched(rope: Mapping[str, Any], length: int) -> int:
    if _type(rope) not in _STRETCHED:
        return length
    factor, original = (_number(rope.get(key)) for key in _ROPE_KEYS)
    return length if factor is None else int(min((original or length) * factor, _MAX_NUMBER))


def _number(value: Any) -> int | float | None:
    """Return the value if it is a number that can be a factor or a length. JSON has integers of any size, and NaN."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and 0 < value <= _MAX_NUMBER else None
