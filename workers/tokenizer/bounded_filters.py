"""Filters of chat templates whose results can be large without a large argument: jinja2's, with bounds."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS as JINJA_FILTERS
from jinja2.filters import make_attrgetter
from jinja2.utils import pass_environment

from workers.tokenizer import value_bounds as bounds

MAX_SEPARATOR_CHARS: Final = 100  # of JSON: indentation and separators
MAX_PRECISION: Final = 300  # decimal digits
REMOVED_FILTERS: Final = ("urlize", "wordwrap", "xmlattr")  # for HTML and for terminals


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Replaces jinja2's own filter, which escapes HTML: models are not trained on escaped text."""
    num_values, num_chars, depth = bounds.measure(value)
    indentation = indent if isinstance(indent, int) else len(indent or "")
    widths = [indentation, *map(len, separators or ())]
    if max(widths) > MAX_SEPARATOR_CHARS:
        raise SecurityError(f"tojson with {max(widths)} characters between values; at most {MAX_SEPARATOR_CHARS}")
    bounds.check_chars(num_chars + num_values * (indentation * depth + sum(widths[1:])))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@pass_environment  # type: ignore[untyped-decorator]
def _join(environment: Any, value: Iterable[Any], d: Any = "", attribute: str | int | None = None) -> str:
    values: Iterable[Any] = value if attribute is None else map(make_attrgetter(environment, attribute), value)
    parts = list(map(str, values))
    bounds.check_join(str(d), parts)
    return str(d).join(parts)


def _replace(s: Any, old: Any, new: Any, count: int | None = None) -> str:
    bounds.check_replace(str(s), str(old), str(new))
    return str(s).replace(str(old), str(new), -1 if count is None else count)


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
    if args and kwargs:
        raise ValueError("format takes positional or keyword arguments, not both")
    bounds.check_format(str(value), kwargs or args)
    return str(value) % (kwargs or args)


def _center(value: Any, width: int = 80) -> str:
    bounds.check_chars(width)
    return str(value).center(width)


def _indent(s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text = str(s)
    bounds.check_chars(len(text) + (len(text.splitlines()) + 1) * (width if isinstance(width, int) else len(width)))
    return str(JINJA_FILTERS["indent"](text, width, first, blank))


def _batch(value: Iterable[Any], linecount: int, fill_with: Any = None) -> Iterator[list[Any]]:
    bounds.check_items(linecount)
    batches: Iterator[list[Any]] = JINJA_FILTERS["batch"](value, linecount, fill_with)
    return batches


@pass_environment  # type: ignore[untyped-decorator]
def _sum(environment: Any, iterable: Iterable[Any], attribute: str | int | None = None, start: Any = 0) -> Any:
    values = iterable if attribute is None else map(make_attrgetter(environment, attribute), iterable)
    total = start
    for value in values:
        bounds.check_sum(total, value)
        total = total + value
    return total


def _round(value: Any, precision: int = 0, method: str = "common") -> Any:
    if abs(precision) > MAX_PRECISION:
        raise SecurityError(f"round to {precision} digits; at most {MAX_PRECISION}")
    return JINJA_FILTERS["round"](value, precision, method)


def _trim(value: Any, chars: str | None = None) -> str:
    bounds.check_strip(chars)
    return str(value).strip(chars)


def _of_list(name: str) -> Callable[..., Any]:
    """A filter of jinja2 that makes a list of its value, which may be a long text."""

    call = JINJA_FILTERS[name]

    @functools.wraps(call)  # with jinja2's mark that says what it passes as the first argument
    def of_list(passed: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(value, str):
            bounds.check_items(len(value))
        return call(passed, value, *args, **kwargs)

    return of_list


FILTERS: Final[dict[str, Callable[..., Any]]] = {
    "batch": _batch,
    "center": _center,
    "format": _format,
    "indent": _indent,
    "join": _join,
    "list": _of_list("list"),
    "replace": _replace,
    "round": _round,
    "slice": _of_list("slice"),
    "sort": _of_list("sort"),
    "sum": _sum,
    "tojson": _to_json,
    "trim": _trim,
}
