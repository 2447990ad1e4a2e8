"""Packs the entries of a record that mean anything, and puts them back.

A record has room for the largest step; most steps use a small part of it. The first dimension of a field says which
count bounds it: a field of "max_num_seqs" has `num_seqs` entries that mean anything. So a new field of a record class
is recorded without a change here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from ipc.errors import ConfigError
from ipc.record_layout import FIELD_ALIGNMENT, Field, Layout, declared_fields
from ipc.records import ResultFields, SamplerVariant, StepFields, StepRecord, StepShape, result_layout, step_layout

Counts = Mapping[str, int]

_COUNT_OF: Final = {  # by a field's first dimension; other fields are packed whole
    "max_num_seqs": "num_seqs",
    "max_appends": "num_appends",
    "max_admissions": "num_admissions",
    "max_prompt_logprobs": "num_prompt_logprobs",
}
_OPTIONAL: Final = {  # results that a step fills only if it asks for them
    "logprob": "num_logprobs",
    "top_ids": "num_logprobs",
    "top_logprobs": "num_logprobs",
    "extra_logprobs": "num_extra_logprobs",
}


class Packing:
    """Of one kind of record. `memory` is always the bytes of one record, [layout.num_bytes].

    Packed: the fields that are whole, then the others by their counts.
    """

    def __init__(self, kind: type, layout: Layout[Any]) -> None:
        self._whole: list[tuple[int, int]] = []  # offset, bytes; neighbours are one
        self._counted: dict[str, list[tuple[int, int]]] = {}  # by count: offset, bytes of an entry
        for declared, field in zip(declared_fields(kind), layout.fields.values(), strict=True):
            count = _OPTIONAL.get(field.name) or _COUNT_OF.get(str(declared.array.dims[0]))
            if count is None:
                self._add_whole(field)
            else:
                self._counted.setdefault(count, []).append((field.offset, field.num_bytes // field.shape[0]))

    def _add_whole(self, field: Field) -> None:
        start, size = field.offset, field.num_bytes
        if self._whole and start - sum(self._whole[-1]) < FIELD_ALIGNMENT:  # nothing lies in between: one copy for both
            former = self._whole.pop()[0]
            start, size = former, start - former + size
        self._whole.append((start, size))

    def pack(self, memory: memoryview, counts: Counts) -> bytes:
        """Copy what means anything."""
        return b"".join([memory[start : start + size] for start, size in self._places(counts)])

    def unpack(self, packed: bytes, memory: memoryview, counts: Callable[[], Counts]) -> None:
        """Undo `pack`. Entries beyond the counts stay as they are.

        `counts` is called when the fields that are whole are there. Raises ConfigError if there are not exactly as many
        bytes as the counts need.
        """
        at = sum(size for _, size in self._whole)
        if len(packed) < at:
            raise ConfigError(f"a record has {len(packed)} bytes, and at least {at} are needed")
        at = 0
        for start, size in self._whole:
            memory[start : start + size] = packed[at : at + size]
            at += size
        places = self._places(counts())[len(self._whole) :]
        if (needed := at + sum(size for _, size in places)) != len(packed):
            raise ConfigError(f"a record has {len(packed)} bytes, and {needed} are needed")
        for start, size in places:
            memory[start : start + size] = packed[at : at + size]
            at += size

    def _places(self, counts: Counts) -> list[tuple[int, int]]:
        places = self._whole.copy()
        for count, fields in self._counted.items():
            if num := counts[count]:
                places += [(start, num * entry_bytes) for start, entry_bytes in fields]
        return places


class StepPacking:
    """Of a step record and the result record that answers it."""

    def __init__(self, shape: StepShape) -> None:
        self._step = Packing(StepFields, step_layout(shape))
        self._result = Packing(ResultFields, result_layout(shape))
        self._most = {
            "num_seqs": shape.max_num_seqs,
            "num_appends": shape.max_appends,
            "num_admissions": shape.max_admissions,
            "num_prompt_logprobs": shape.max_prompt_logprobs,
        }

    def pack(self, record: StepRecord, step: memoryview, result: memoryview) -> tuple[bytes, bytes]:
        """The packed step record and result record. `record` are the views of `step`."""
        counts = _counts(record)
        return self._step.pack(step, counts), self._result.pack(result, counts)

    def unpack_step(self, packed: bytes, record: StepRecord, memory: memoryview) -> None:
        """Write a packed step record to `memory`, of which `record` are the views.

        Raises ConfigError for counts that do not fit, and for another number of bytes than they need.
        """
        self._step.unpack(packed, memory, lambda: self._checked_counts(record))

    def unpack_result(self, packed: bytes, record: StepRecord, memory: memoryview) -> None:
        """Write the packed result record of this step to `memory`. Raises ConfigError as `unpack_step` does."""
        self._result.unpack(packed, memory, lambda: _counts(record))

    def _checked_counts(self, record: StepRecord) -> Counts:
        counts = _counts(record)
        for name, most in self._most.items():
            if not 0 <= counts[name] <= most:
                raise ConfigError(f"a step has {name} = {counts[name]}, which is not from 0 to {most}")
        return counts


def _counts(record: StepRecord) -> dict[str, int]:
    """How many entries of each kind mean anything in a step record and in its result record."""
    num_seqs, wants = int(record.num_seqs[0]), bool(record.want_logprobs[0])
    is_adjusted = int(record.variant[0]) == SamplerVariant.ADJUSTED
    return {
        "num_seqs": num_seqs,
        "num_appends": int(record.num_appends[0]),
        "num_admissions": int(record.num_admissions[0]),
        "num_prompt_logprobs": int(record.num_prompt_logprobs[0]),
        "num_logprobs": num_seqs if wants else 0,
        "num_extra_logprobs": num_seqs if wants and is_adjusted else 0,
    }
