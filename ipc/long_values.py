"""Long values: parameters of a request that are too long for the columns of every admission.

The tokenizer checks them against the vocabulary and encodes them. The scheduler writes the encoded words to its upload
ring when it first admits the sequence. The GPU process copies each column to the row's part of a device table.

Encoded: int32 words. Word 0 has bit i set for each column i that follows; the columns follow in the order of their
declaration, each at its full size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Final, Generic

import numpy as np

from ipc.record_layout import Array, Field, HostArray, Layout, declared_fields, field_names, float32, int32
from ipc.records import NO_TOKEN, Fill, StepShape
from ipc.sampling_params import MAX_LOGIT_BIAS, MAX_LOGPROB_TOKEN_IDS

MAX_BAD_WORD_IDS: Final = 2_048  # of all bad words of a request together, with one terminator for each


class LongColumns(Generic[Array]):
    """The one declaration of long values. From it derive the device tables and the bytes that carry them."""

    token_mask: Annotated[Array, int32("mask_words")]
    """The tokens that may be sampled, one bit each (StepShape.mask_words): allowed_token_ids without bad words of one
    token."""
    bias_ids: Annotated[Array, int32(MAX_LOGIT_BIAS), Fill(NO_TOKEN)]
    """The tokens of logit_bias, each once; unused places hold NO_TOKEN."""
    bias_values: Annotated[Array, float32(MAX_LOGIT_BIAS)]
    """What is added to their logits."""
    bad_words: Annotated[Array, int32(MAX_BAD_WORD_IDS), Fill(NO_TOKEN)]
    """Bad words of two or more tokens, each followed by NO_TOKEN; unused places hold NO_TOKEN."""
    logprob_ids: Annotated[Array, int32(MAX_LOGPROB_TOKEN_IDS), Fill(NO_TOKEN)]
    """The tokens of logprob_token_ids; unused places hold NO_TOKEN."""


LONG_COLUMNS: Final = field_names(LongColumns)
TOKEN_MASK, BIAS_IDS, BIAS_VALUES, BAD_WORDS, LOGPROB_IDS = (1 << i for i in range(len(LONG_COLUMNS)))  # as bits


def long_layout(shape: StepShape) -> Layout[LongColumns[HostArray]]:
    """One row's long values."""
    return Layout.of(LongColumns[HostArray], "long_values", shape)


def max_long_words(shape: StepShape) -> int:
    """The most words that a request's encoded long values have."""
    return 1 + sum(field.num_items for field in long_layout(shape).fields.values())


def encode_long_values(shape: StepShape, columns: dict[str, Any]) -> bytes:
    """Encode columns by name; each is an array of at most its column's length, which is filled up. b"" for none."""
    if not columns:
        return b""
    layout = long_layout(shape)
    assert columns.keys() <= set(LONG_COLUMNS), f"{sorted(columns)} are no long columns: {LONG_COLUMNS}"
    bits, parts = 0, []
    for i, name in enumerate(LONG_COLUMNS):
        if name in columns:
            bits |= 1 << i
            field = layout.fields[name]
            whole = np.full(field.num_items, _FILLS[name], field.dtype)
            whole[: len(columns[name])] = columns[name]
            parts.append(whole.tobytes())
    return np.int32(bits).tobytes() + b"".join(parts)


def long_columns_of(words: HostArray) -> int:
    """The columns that encoded words hold, as bits."""
    return int(words[0]) if len(words) else 0


def places(layout: Layout[Any], bits: int) -> Iterator[tuple[Field, int]]:
    """Yield each column that encoded words with these bits hold, and the index of its first word."""
    start = 1
    for i, field in enumerate(layout.fields.values()):
        if bits >> i & 1:
            yield field, start
            start += field.num_items


def num_words(layout: Layout[Any], bits: int) -> int:
    """The number of encoded words with these bits."""
    return 1 + sum(field.num_items for field, _ in places(layout, bits))


def _fills() -> dict[str, float]:
    fills: dict[str, float] = {}
    for column in declared_fields(LongColumns):
        fill = next((mark.value for mark in column.marks if isinstance(mark, Fill)), 0)
        assert isinstance(fill, int | float), f"long column {column.path[0]}: its fill must be a number"
        fills[column.path[0]] = fill
    return fills


_FILLS: Final = _fills()
