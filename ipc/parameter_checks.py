"""Checks of parameter structs: a rule for each field, and one form of error message."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from ipc.errors import InvalidRequest

Rule = tuple[Callable[[Any], bool], str]  # whether a value is valid, and the rule in words


def check_fields(params: object, rules: Mapping[str, Rule]) -> None:
    """Raise InvalidRequest, naming field, value and rule, for the first field whose value is not valid."""
    for field, (is_valid, rule) in rules.items():
        value = getattr(params, field)
        if not is_valid(value):
            raise InvalidRequest(f"{field} ({reprlib.repr(value)}) {rule}")


def is_int(value: object, low: int, high: int) -> bool:
    """Whether a value is an integer in [low, high). A truth value is none."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < high


def is_ints(values: list[Any], low: int, high: int) -> bool:
    """Whether all values are integers in [low, high)."""
    return all(is_int(value, low, high) for value in values)


def is_real(value: object) -> bool:
    """Whether a value is a finite number. A truth value is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
