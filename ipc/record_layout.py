"""Derives the bytes of a fixed-size record from a class, and views of those bytes typed as that class.

    class Sample(Generic[Array]):
        count: Annotated[Array, int32(1)]
        weights: Annotated[Array, float32("max_weights", 4)]

    layout = Layout.of(Sample[HostArray], "sample", bounds)  # bounds.max_weights sizes the second field
    sample = layout.views(buffer)                            # a Sample[HostArray]: mypy refuses sample.weight

Both ends of a ring derive the same layout from the same class and see the same bytes. The layout's hash stands in the
ring's header. Two programs that disagree therefore fail when they attach, and not when they read the data.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Final, Generic, TypeVar, cast, get_args, get_origin, get_type_hints

import numpy as np

FIELD_ALIGNMENT: Final = 64  # bytes; no scalar ever straddles a cache line, and device vector loads stay aligned

HostArray = np.ndarray[Any, np.dtype[Any]]  # what a record's field is on the host; in device memory it is a tensor

Array = TypeVar("Array")  # the parameter of a record class: what its fields are where they are used
R = TypeVar("R")
T = TypeVar("T")


# What a record class says about a field


@dataclass(frozen=True)
class ArrayType:
    """The dtype and shape of a field. A string among `dims` names an attribute of the bounds."""

    dtype: str
    dims: tuple[int | str, ...]


def int32(*dims: int | str) -> ArrayType:
    """For example `int32("max_num_seqs")`; no dimension: one number for each entry of the enclosing `Each`."""
    return ArrayType("<i4", dims)


def int64(*dims: int | str) -> ArrayType:
    return ArrayType("<i8", dims)


def float32(*dims: int | str) -> ArrayType:
    return ArrayType("<f4", dims)


@dataclass(frozen=True)
class Each:
    """Marks a field that is a record class itself, with `dim` entries of each of its fields.

    Within `admit: Annotated[Admissions[Array], Each("max_admissions")]` a field `row` lies in memory as `admit_row`.
    """

    dim: int | str


@dataclass(frozen=True)
class DeclaredField:
    """A field as its class declares it, before the bounds are known. `marks` are its annotations, in order."""

    path: tuple[str, ...]  # attributes from the record to the array
    array: ArrayType
    marks: tuple[object, ...]


def declared_fields(kind: type) -> tuple[DeclaredField, ...]:
    """The array fields of a record class in the order in which they lie in memory.

    A class's own fields lie in front of those of its base class. Attributes without an ArrayType are no fields.
    """
    return _declared_fields(kind)


@functools.cache
def _declared_fields(kind: type) -> tuple[DeclaredField, ...]:
    return tuple(_find_fields(kind))


def _find_fields(kind: type) -> Iterator[DeclaredField]:
    hints = get_type_hints(kind, include_extras=True)
    for base in kind.__mro__:
        for name in vars(base).get("__annotations__", {}):
            if get_origin(hints[name]) is not Annotated:
                continue
            inner, *marks = get_args(hints[name])
            for mark in marks:
                if isinstance(mark, ArrayType):
                    yield DeclaredField((name,), mark, tuple(marks))
                elif isinstance(mark, Each):
                    for field in declared_fields(class_of(inner)):
                        array = ArrayType(field.array.dtype, (mark.dim, *field.array.dims))
                        yield DeclaredField((name, *field.path), array, field.marks)


def field_names(kind: type) -> tuple[str, ...]:
    """The names of a record class's fields, in the order in which they lie in memory."""
    return tuple("_".join(field.path) for field in declared_fields(kind))


def class_of(kind: type) -> type:
    """The class itself of a parametrized class such as `StepFields[HostArray]`."""
    return get_origin(kind) or kind


# Where the fields lie


@dataclass(frozen=True)
class Field:
    """One array of a record. `offset` is in bytes from the start of the record."""

    name: str  # its path, joined by "_"
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    path: tuple[str, ...]  # attributes from the record to the array

    @property
    def num_items(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_items * self.dtype.itemsize

    def of(self, record: object) -> Any:
        """This field's array in a record, for code that treats all fields alike."""
        return functools.reduce(getattr, self.path, record)


class _Views:
    """A group of fields, or the fields of a layout that no class declares."""


class Layout(Generic[R]):
    """An immutable table of fields, in the order in which they lie in memory. `R` is the type of a record's views."""

    def __init__(
        self, name: str, fields: Iterable[tuple[str, str, tuple[int, ...]]], kind: type[R] | None = None
    ) -> None:
        """From (name, dtype, shape) of each field. See `of` for the layout of a record class."""
        self.name = name
        self.kind = cast(type[R], _Views) if kind is None else kind
        self._place(((field,), dtype, shape) for field, dtype, shape in fields)

    @classmethod
    def of(cls, kind: type[R], name: str, bounds: object, *, each: int | str | None = None) -> Layout[R]:
        """The layout of a record class. The attributes of `bounds` give the sizes that the class names.

        With `each`, every field has that many entries, as one that is marked `Each` has.
        """
        layout: Layout[R] = cls(name, (), kind)
        first = () if each is None else (each,)
        layout._place(
            (field.path, field.array.dtype, tuple(_size(dim, bounds) for dim in (*first, *field.array.dims)))
            for field in declared_fields(class_of(kind))
        )
        return layout

    def _place(self, fields: Iterable[tuple[tuple[str, ...], str, tuple[int, ...]]]) -> None:
        table: dict[str, Field] = {}
        offset = 0
        for path, dtype, shape in fields:
            field = Field("_".join(path), np.dtype(dtype), shape, offset, path)
            assert field.name not in table, f"layout {self.name}: field {field.name} is declared twice"
            table[field.name] = field
            offset += -(-field.num_bytes // FIELD_ALIGNMENT) * FIELD_ALIGNMENT
        self.fields = table
        self.num_bytes = offset

    def hash(self) -> int:
        """63-bit digest of names, types, shapes and offsets."""
        text = ";".join(f"{f.name}:{f.dtype.str}:{f.shape}:{f.offset}" for f in self.fields.values())
        return int.from_bytes(hashlib.sha256(f"{self.name};{text}".encode()).digest()[:8], "little") >> 1

    def views(self, buffer: memoryview | HostArray, offset: int = 0) -> R:
        """Numpy views of one record that starts `offset` bytes into `buffer`.

        The views alias the buffer and keep it from being unmapped (`np.ndarray(buffer=...)` would not).
        """
        return make_record(self, self.kind, lambda f: (
            np.frombuffer(buffer, f.dtype, f.num_items, offset + f.offset).reshape(f.shape)
        ))  # fmt: skip


def make_record(layout: Layout[Any], kind: type[T], array_of: Callable[[Field], object]) -> T:
    """A record of class `kind` whose fields are what `array_of` returns for them."""
    record: T = object.__new__(cast(type[T], class_of(kind)))
    set_fields(record, layout, array_of)
    return record


def set_fields(record: object, layout: Layout[Any], array_of: Callable[[Field], object]) -> None:
    """Set every field of a record to what `array_of` returns for it."""
    for field in layout.fields.values():
        owner = record
        for name in field.path[:-1]:
            if not hasattr(owner, name):
                setattr(owner, name, _Views())
            owner = getattr(owner, name)
        setattr(owner, field.path[-1], array_of(field))


def _size(dim: int | str, bounds: object) -> int:
    return dim if isinstance(dim, int) else int(getattr(bounds, dim))
