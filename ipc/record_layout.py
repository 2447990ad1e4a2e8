"""Lays out a fixed-size record from a declared table of fields: (name, dtype, shape) -> offset.

Both ends of a ring build the same table and get numpy views of the same bytes; the layout's hash stands in the
ring's header, so that two programs that disagree find out at attach and not in the data.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final

import numpy as np

FIELD_ALIGNMENT: Final = 64  # bytes; no scalar ever straddles a cache line, and device vector loads stay aligned


@dataclass(frozen=True)
class Field:
    """One array of a record. `offset` is in bytes from the start of the record."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    @property
    def num_items(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_items * self.dtype.itemsize


class Layout:
    """An immutable table of fields, in the order in which they lie in memory."""

    def __init__(self, name: str, fields: Iterable[tuple[str, str, tuple[int, ...]]]) -> None:
        self.name = name
        table: dict[str, Field] = {}
        offset = 0
        for field_name, dtype, shape in fields:
            assert field_name not in table, f"layout {name}: field {field_name} is declared twice"
            field = Field(field_name, np.dtype(dtype), shape, offset)
            table[field_name] = field
            offset += -(-field.num_bytes // FIELD_ALIGNMENT) * FIELD_ALIGNMENT
        self.fields = table
        self.num_bytes = offset

    def hash(self) -> int:
        """63-bit digest of names, types, shapes and offsets."""
        text = ";".join(f"{f.name}:{f.dtype.str}:{f.shape}:{f.offset}" for f in self.fields.values())
        return int.from_bytes(hashlib.sha256(f"{self.name};{text}".encode()).digest()[:8], "little") >> 1

    def views(self, buffer: memoryview | np.ndarray[Any, Any], offset: int = 0) -> Any:
        """Numpy views of one record that starts `offset` bytes into `buffer`, one attribute per field.

        The views alias the buffer and keep it from being unmapped (`np.ndarray(buffer=...)` would not).
        """
        return SimpleNamespace(**{
            f.name: np.frombuffer(buffer, f.dtype, f.num_items, offset + f.offset).reshape(f.shape)
            for f in self.fields.values()
        })  # fmt: skip
