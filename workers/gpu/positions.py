"""How long a model's sequences may be, by its configuration. Knows neither torch nor transformers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

_LENGTH_KEYS: Final = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
_MAX_POSITIONS: Final = 2**31 - 1
_STRETCHED: Final = ("linear", "yarn", "llama3")  # others change with the length, or are part of the length as given


def num_positions(text_config: Mapping[str, Any]) -> int | None:
    """The declared length, or what a factor of RoPE makes of it, whichever is more; None if there is none.

    A factor multiplies the length that the model was trained for: `original_max_position_embeddings`, or else the
    declared one. Both are common: a length with the factor in it, and one that was left as it was. Where layers have
    different RoPE, all must reach.
    """
    known = (text_config.get(key) for key in _LENGTH_KEYS)
    length = next((value for value in known if isinstance(value, int) and value >= 1), None)
    if length is None:
        return None
    return max(length, min((_stretched(rope, length) for rope in _ropes(text_config)), default=length))


def _ropes(text_config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    declared = text_config.get("rope_scaling") or text_config.get("rope_parameters")  # as transformers has it
    if not isinstance(declared, Mapping):
        return
    by_layer_type = [each for each in declared.values() if isinstance(each, Mapping)]
    yield from by_layer_type or [declared]


def _stretched(rope: Mapping[str, Any], length: int) -> int:
    if rope.get("rope_type", rope.get("type")) not in _STRETCHED:
        return length
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings") or length
    if not isinstance(factor, int | float) or not isinstance(original, int | float) or math.isnan(factor * original):
        return length  # transformers says what is wrong with it
    return int(min(original * factor, _MAX_POSITIONS))
