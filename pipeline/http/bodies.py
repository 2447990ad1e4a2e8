"""Reads the JSON bodies of requests into typed structs, and decides about fields that a struct does not have.

A field that would change the answer is refused, because an ignored parameter is worse than an error. A field without
an effect on the answer is accepted, and named once in the log.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Collection, Mapping
from typing import Any, Final, TypeVar

import msgspec

from pipeline.http.errors import HttpError

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=msgspec.Struct)

# Fields of OpenAI's and Anthropic's APIs that say nothing about the text of an answer.
HARMLESS: Final = frozenset({
    "user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_options",
    "prompt_cache_retention", "prediction", "verbosity", "store", "inference_geo", "container", "cache_control",
    "client_metadata",
})  # fmt: skip
_logged: Final[set[str]] = set()
_MAX_SHOWN: Final = 100  # characters of a name that the client has chosen; comparing a long one takes seconds
_PLACE: Final = re.compile(r"^(?P<rule>.*?)(?: - at `\$?\.?(?P<place>[^`]*)`)?$", re.DOTALL)


def read_json(body: bytes) -> dict[str, Any]:
    """The object that a body holds. Raises HttpError 400."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HttpError(400, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise HttpError(400, f"the body must be a JSON object, not {_kind(value)}")
    return value


def read_body(
    body: bytes, kind: type[T], *, harmless: Collection[str] = (), neutral: Mapping[str, Collection[Any]] | None = None
) -> T:
    """The body as `kind`. Raises HttpError 400, naming the field.

    Args:
        body: JSON text.
        kind: a struct with one attribute for each field that the endpoint knows.
        harmless: fields that are accepted and have no effect, besides HARMLESS.
        neutral: fields that the endpoint cannot honour, with the values besides null that change nothing.
    """
    return convert(read_json(body), kind, harmless=harmless, neutral=neutral)


def convert(
    values: dict[str, Any],
    kind: type[T],
    *,
    harmless: Collection[str] = (),
    neutral: Mapping[str, Collection[Any]] | None = None,
) -> T:
    """The same for a decoded object."""
    known = frozenset(kind.__struct_encode_fields__)
    if not values.keys() <= known:
        for name, value in values.items():
            if name not in known:
                _check_unknown(name, value, known, harmless, neutral or {})
        values = {name: value for name, value in values.items() if name in known}
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        found = _PLACE.match(str(error))
        assert found is not None, "the pattern matches every text"
        place = found["place"] or None
        rule = found["rule"][:1].lower() + found["rule"][1:]
        raise HttpError(400, f"{place or 'the body'}: {rule}", param=place) from None


def _check_unknown(
    name: str, value: Any, known: Collection[str], harmless: Collection[str], neutral: Mapping[str, Collection[Any]]
) -> None:
    if name in neutral:
        if value is None or value in neutral[name]:
            return
        raise HttpError(400, f"{name} is not supported by this server: leave it out", param=name)
    if name not in HARMLESS and name not in harmless:
        nearest = difflib.get_close_matches(name[:_MAX_SHOWN], known, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else "leave it out"
        raise HttpError(400, f"{name[:_MAX_SHOWN]} is no field of this request: {hint}", param=name[:_MAX_SHOWN])
    if value is not None and name not in _logged:
        _logged.add(name)
        logger.info("requests carry the field %s, which has no effect here", name)


def _kind(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), "something else")
