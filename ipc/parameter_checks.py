"""Checks of parameter structs: a rule for each field, and one form of error message."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from ipc.errors import InvalidRequest

Rule = tuple[Callable[[Any], bool], str]  # whether a value is valid, and the rule in words


def check_fields(params: msgspec.Struct, rules: Mapping[str, Rule]) -> None:
    """Raise InvalidRequest, naming field, value and rule, for the first field whose value is not valid.

    Tuples, arrays and numbers of numpy are replaced by the plain values that they stand for.
    """
    for field, (is_valid, rule) in rules.items():
        value = getattr(params, field)
        if not is_valid(value):
            plain = _plain(value)
            if plain is None or not is_valid(plain):
                raise InvalidRequest(f"{field} ({reprlib.repr(value)}) {rule}")
            msgspec.structs.force_setattr(params, field, plain)


def _plain(value: Any) -> Any:
    """The value in Python's own types. None for a value that is refused as it is."""
    if hasattr(value, "tolist"):  # numpy's numbers and arrays; clients need not have numpy
        return value.tolist()
    if isinstance(value, dict):
        return {_plain_item(key): _plain_item(item) for key, item in value.items()}
    return [_plain_item(item) for item in value] if isinstance(value, list | tuple) else None


def _plain_item(item: Any) -> Any:
    return item.tolist() if hasattr(item, "tolist") else item


def is_int(value: object, low: int, high: int) -> bool:
    """Whether a value is an integer in [low, high). A truth value is none."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < high


def is_ints(values: list[Any], low: int, high: int) -> bool:
    """Whether all values are integers in [low, high)."""
    return all(is_int(value, low, high) for value in values)


def is_real(value: object) -> bool:
    """Whether a value is a finite number. A truth value is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
