"""Bounds on the values that a chat template makes: how long a text, how many items, how large a number.

Each check runs before its operation and raises SecurityError, which ends the rendering of this chat.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

from jinja2.exceptions import SecurityError

MAX_CHARS: Final = 16 << 20  # of one text; a client's whole message has no more
MAX_VALUES: Final = 500_000  # in one list, and in one value with everything in it
MAX_INT_BITS: Final = 4_096
MAX_STRIP_CHARS: Final = 1_000  # `strip` compares each character with all of them
_PADDING: Final = {"center", "ljust", "rjust", "zfill"}
_NUMBER: Final = re.compile(r"\d+")


def check_chars(num_chars: int) -> None:
    """Raise SecurityError for a text of this many characters if it is too long."""
    if num_chars > MAX_CHARS:
        raise SecurityError(f"the template makes a text of more than {MAX_CHARS} characters")


def check_items(num_items: int) -> None:
    """Raise SecurityError for a list of this many items if it is too long."""
    if num_items > MAX_VALUES:
        raise SecurityError(f"the template makes a list of more than {MAX_VALUES} items")


def check_bits(num_bits: int) -> None:
    """Raise SecurityError for an integer of this many bits if it is too large."""
    if num_bits > MAX_INT_BITS:
        raise SecurityError(f"the template makes a number of more than {MAX_INT_BITS} bits")


def check_binop(operator: str, left: Any, right: Any) -> None:
    """Raise SecurityError if the result of `left operator right` would be too large."""
    if operator == "+":
        check_sum(left, right)
    elif operator == "%":
        if isinstance(left, str):
            check_format(left, right)
    elif isinstance(left, int) and isinstance(right, int):
        if operator == "**":
            check_bits(left.bit_length() * max(right, 0))
        else:
            check_bits(left.bit_length() + right.bit_length())
    elif operator == "*":
        _check_repeated(*((right, left) if isinstance(left, int) else (left, right)))


def check_sum(left: Any, right: Any) -> None:
    """Raise SecurityError if `left + right` would be too long a text or list."""
    if isinstance(left, str) and isinstance(right, str):
        check_chars(len(left) + len(right))
    elif isinstance(left, list | tuple) and isinstance(right, list | tuple):
        check_items(len(left) + len(right))
        if len(left) > 1 and len(right) > 1:  # else: a list that grows by an item at a time
            checked_value((left, right))


def _check_repeated(value: Any, times: Any) -> None:
    if not isinstance(times, int) or times <= 0:
        return
    if isinstance(value, str | bytes):
        check_chars(len(value) * times)
    elif isinstance(value, list | tuple):
        check_items(len(value) * times)
        check_items(measure(value)[0] * times)


def check_format(text: str, values: Any) -> None:
    """Raise SecurityError if `text % values` could be too long."""
    given = values if isinstance(values, tuple) else tuple(values.values()) if isinstance(values, dict) else (values,)
    if isinstance(values, dict):
        given = (*given, values)
    longest = max((len(value) if isinstance(value, str) else len(str(value)) for value in given), default=0)
    width = largest_number(text)
    if "*" in text:  # a width among the values
        width = max((abs(value) for value in given if isinstance(value, int)), default=0) + width
    check_chars(len(text) + text.count("%") * (longest + width))


def largest_number(text: str) -> int:
    """The largest decimal number in a format, which may be a width; 0 = none."""
    return max((int(digits) if len(digits) < 10 else 10**9 for digits in _NUMBER.findall(text)), default=0)


def checked_arguments(text: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The positional arguments for a method of `text`. Raises SecurityError if its result would be too long."""
    given = (*args, *kwargs.values())
    if method in _PADDING:
        check_chars(max((value for value in given if isinstance(value, int)), default=0))
    elif method == "expandtabs":
        check_chars(text.count("\t") * max((value for value in given if isinstance(value, int)), default=8) + len(text))
    elif method == "replace" and len(args) > 1:
        check_replace(text, args[0], args[1])
    elif method == "join" and args:
        parts = list(args[0])
        check_join(text, parts)
        return (parts, *args[1:])
    elif method in ("strip", "lstrip", "rstrip") and args:
        check_strip(args[0])
    return args


def check_replace(text: str, old: Any, new: Any) -> None:
    """Raise SecurityError if `text.replace(old, new)` would be too long."""
    if isinstance(old, str) and isinstance(new, str) and len(new) > len(old):
        check_chars(len(text) + text.count(old) * (len(new) - len(old)))


def check_join(separator: str, parts: Iterable[Any]) -> None:
    """Raise SecurityError if `separator.join(parts)` would be too long."""
    check_chars(sum(len(part) + len(separator) for part in parts if isinstance(part, str)))


def check_strip(chars: Any) -> None:
    """Raise SecurityError if `text.strip(chars)` could take long."""
    if isinstance(chars, str) and len(chars) > MAX_STRIP_CHARS:
        raise SecurityError(f"the template strips {len(chars)} characters; at most {MAX_STRIP_CHARS} are allowed")


def checked_value(value: Any) -> Any:
    """The same value. Raises SecurityError if it has too many values in it, counted as often as they occur."""
    measure(value)
    return value


def measure(value: Any) -> tuple[int, int, int]:
    """Number of values, characters of all texts, and depth of a JSON value. Raises SecurityError if it is too large."""
    num_values = num_chars = depth = 0
    level = [value]
    while level:
        depth += 1
        num_values += len(level)
        check_items(num_values)
        below: list[Any] = []
        for each in level:
            if isinstance(each, str):
                num_chars += len(each)
            elif isinstance(each, dict):
                num_chars += sum(len(key) for key in each if isinstance(key, str))
                below += each.values()
            elif isinstance(each, list | tuple):
                below += each
            check_items(len(below))
        level = below
    return num_values, num_chars, depth
