"""The keys of a configuration section, read from its struct: type, range, default and description of each.

Owns how types, ranges and values are written, in errors, in TOML and in docs/configuration.md. Knows no section by
name.
"""

from __future__ import annotations

import functools
import json
import types
import typing
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import inspect


@dataclass(frozen=True)
class ConfigField:
    """One key of a section."""

    key: str
    kind: Any  # its type, without ranges
    default: Any  # msgspec.NODEFAULT = the key must be given
    description: str
    number: inspect.IntType | inspect.FloatType | None  # the range of a number

    def check(self, value: Any) -> Any:
        """The value in this key's type. Raises ValueError with value and rule: "(9) must lie in [1, 8]"."""
        try:
            converted = msgspec.convert(value, self.kind)
        except msgspec.ValidationError:
            raise ValueError(f"({value!r}) must be {describe_type(self.kind)}") from None
        if converted is not None and self.number is not None and not _lies_in(self.number, converted):
            rule = "must be a number of seconds in" if self.key.endswith("_s") else "must lie in"
            raise ValueError(f"({converted!r}) {rule} {self.range()}")
        return converted

    def range(self) -> str:
        """In brackets: "[1, 8]", or "(0, 1]" if 0 is not part of it. Empty for a key without one."""
        number = self.number
        if number is None:
            return ""
        low = f"({_text(number.gt)}" if number.gt is not None else f"[{_text(number.ge)}"
        return f"{low}, {_text(number.le)}]"


@functools.cache
def fields_of(section: type[msgspec.Struct]) -> dict[str, ConfigField]:
    """The fields of a section's struct by key, in their order."""
    plain_types = typing.get_type_hints(section)  # without Annotated
    fields = {}
    for field in msgspec.structs.fields(section):
        description, number = _read(inspect.type_info(field.type))
        fields[field.name] = ConfigField(field.name, plain_types[field.name], field.default, description, number)
    return fields


def describe_type(kind: Any) -> str:
    """A type in words."""
    arguments = [argument for argument in typing.get_args(kind) if argument is not types.NoneType]
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(f'"{argument}"' for argument in arguments)
    if typing.get_origin(kind) is list:
        return f"a list of {describe_type(arguments[0]).split(' ', 1)[1]}s"
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return " or ".join(describe_type(argument) for argument in arguments)
    return {int: "an integer", float: "a number", str: "a string", bool: "true or false"}[kind]


def toml_value(value: Any) -> str:
    """A value of a configuration as TOML."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value)


def _read(info: inspect.Type) -> tuple[str, inspect.IntType | inspect.FloatType | None]:
    """The description and the range in a field's annotation."""
    description, number = "", None
    if isinstance(info, inspect.Metadata):
        description, number = _read(info.type)
        description = (info.extra_json_schema or {}).get("description", description)
    elif isinstance(info, inspect.UnionType):
        for part in info.types:
            part_description, part_number = _read(part)
            description, number = description or part_description, number or part_number
    elif isinstance(info, inspect.IntType | inspect.FloatType) and info.le is not None:
        number = info
    return description, number


def _lies_in(number: inspect.IntType | inspect.FloatType, value: float) -> bool:
    """False for NaN too."""
    above = value > number.gt if number.gt is not None else number.ge is not None and value >= number.ge
    return above and number.le is not None and value <= number.le


def _text(bound: float | None) -> str:
    return f"{bound:g}" if isinstance(bound, float) else str(bound)
