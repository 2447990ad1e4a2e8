"""Weights of 4 or 8 bits as GPTQ's tools pack them.

    qweight  [ceil(K * bits / 32), N] int32: the numbers of a column, from the lowest bits of its first word on
    qzeros   [groups, ceil(N * bits / 32)] int32: zero points, packed along the rows; the format "gptq" subtracts one
    scales   [groups, N]
    g_idx    [K] int32: the group of each row; without act order, or if it is missing, they are in order

Sources: AutoGPTQ (auto_gptq/nn_modules/qlinear/qlinear_cuda.py) for "gptq", and GPTQModel
(gptqmodel/nn_modules/qlinear/__init__.py: dequantize_weight, utils/model.py: convert_gptq_v1_to_v2_format) for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from workers.gpu.model.formats.stored_format import (
    StoredWeight,
    check_dimensions,
    check_dtype,
    check_groups,
    check_shape,
    dequantise_groups,
    find_bits,
    find_packed,
    groups_of_columns,
    num_words,
    unpack,
)


class Gptq:
    """`bits` and `group_sizes` are those that config.json declares (-1: one group). The true zero points are
    `zero_offset` larger than the stored ones."""

    def __init__(self, bits: Sequence[int], group_sizes: Sequence[int], zero_offset: int) -> None:
        self._bits = bits
        self._group_sizes = group_sizes
        self._zero_offset = zero_offset

    def find(self, dtypes: Mapping[str, str]) -> Iterator[StoredWeight]:
        yield from find_packed(dtypes, "qweight", ("qzeros", "scales"), ("g_idx",))

    def dequantise(
        self, weight: StoredWeight, parts: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        packed, qzeros, scales, group_of = parts["qweight"], parts["qzeros"], parts["scales"], parts.get("g_idx")
        check_dimensions(weight, parts, "qweight", "qzeros", "scales")
        check_dtype(weight, parts, "qweight", torch.int32)
        check_dtype(weight, parts, "qzeros", torch.int32)
        num_groups, num_outputs = scales.shape
        bits = find_bits(weight, "qzeros", qzeros.shape[1], num_outputs, self._bits)
        check_shape(weight, parts, "qzeros", [num_groups, num_words(num_outputs, bits)])
        if group_of is None or not group_of.numel():
            num_inputs = packed.shape[0] * 32 // bits
            groups = groups_of_columns(weight, "scales", num_groups, num_inputs, self._group_sizes, packed.device)
        else:
            num_inputs = len(group_of)
            groups_of_columns(weight, "scales", num_groups, num_inputs, self._group_sizes, packed.device)
            check_groups(weight, "g_idx", group_of, num_groups)
            groups = group_of.long()
        check_shape(weight, parts, "qweight", [num_words(num_inputs, bits), num_outputs])
        numbers = unpack(packed.t(), bits)[:, :num_inputs]
        zeros = unpack(qzeros, bits)[:, :num_outputs].t() + self._zero_offset
        return dequantise_groups(numbers, zeros, scales.t(), groups, dtype, bits)
