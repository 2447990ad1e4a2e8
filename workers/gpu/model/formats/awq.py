"""Weights of 4 bits as AutoAWQ packs them for its product "gemm".

    qweight  [K, N / 8] int32: the numbers of a row, eight in a word; from the lowest bits on, a word holds the outputs
             0, 2, 4, 6, 1, 3, 5, 7
    qzeros   [groups, N / 8] int32: zero points, packed in the same way
    scales   [groups, N]

Source: AutoAWQ (awq/modules/linear/gemm.py: WQLinear_GEMM.from_linear; awq/utils/packing_utils.py: dequantize_gemm).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import torch

from workers.gpu.model.formats.stored_format import (
    StoredWeight,
    check_dimensions,
    check_dtype,
    check_shape,
    dequantise_groups,
    find_bits,
    find_packed,
    groups_of_columns,
    num_words,
    unpack,
)

_BITS: Final = 4
_POSITIONS: Final = (0, 4, 1, 5, 2, 6, 3, 7)  # in a word, of its outputs in order


class Awq:
    """`group_sizes` are those that config.json declares (-1: one group)."""

    def __init__(self, group_sizes: Sequence[int]) -> None:
        self._group_sizes = group_sizes

    def find(self, dtypes: Mapping[str, str]) -> Iterator[StoredWeight]:
        yield from find_packed(dtypes, "qweight", ("qzeros", "scales"))

    def dequantise(
        self, weight: StoredWeight, parts: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        packed, qzeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
        check_dimensions(weight, parts, "qweight", "qzeros", "scales")
        check_dtype(weight, parts, "qweight", torch.int32)
        check_dtype(weight, parts, "qzeros", torch.int32)
        num_inputs, (num_groups, num_outputs) = len(packed), scales.shape
        find_bits(weight, "qweight", packed.shape[1], num_outputs, [_BITS])
        check_shape(weight, parts, "qzeros", [num_groups, num_words(num_outputs, _BITS)])
        groups = groups_of_columns(weight, "scales", num_groups, num_inputs, self._group_sizes, packed.device)
        numbers, zeros = (_in_order(words)[:, :num_outputs].t() for words in (packed, qzeros))
        return dequantise_groups(numbers, zeros, scales.t(), groups, dtype, _BITS)


def _in_order(words: torch.Tensor) -> torch.Tensor:
    """Return the numbers in `words` [rows, W] in the order of their outputs, [rows, W * 8]."""
    return unpack(words, _BITS).view(len(words), -1, len(_POSITIONS))[..., _POSITIONS].flatten(1)
