"""Weights of 4 or 8 bits as compressed-tensors packs them, in its format pack-quantized (W4A16, W8A16).

    weight_packed      [N, ceil(K * bits / 32)] int32: the numbers of a row, from the lowest bits of its first word on,
                       plus 2^(bits - 1)
    weight_scale       [N, groups]; [N, 1]: of each channel; [] or [1]: one for all
    weight_zero_point  [ceil(N * bits / 32), groups] int32, packed along the rows; older versions: [N, groups] int8;
                       missing if the numbers are symmetric
    weight_shape       [2]: N, K
    weight_g_idx       [K] int32: the group of each column (act order); missing, or with -1, if they are in order

Source: compressed-tensors (compressors/pack_quantized/base.py and helpers.py, quantization/lifecycle/forward.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from workers.gpu.model.formats.stored_format import (
    MalformedWeights,
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


class CompressedIntegers:
    """`bits` and `group_sizes` are those that config.json declares (-1: one group), `has_zero_points` whether it
    declares all weights as asymmetric."""

    def __init__(self, bits: Sequence[int], group_sizes: Sequence[int], has_zero_points: bool) -> None:
        self._bits = bits
        self._group_sizes = group_sizes
        zero_points = ("weight_zero_point",)
        self._needed = ("weight_scale", "weight_shape", *(zero_points if has_zero_points else ()))
        self._optional = ("weight_g_idx", *(() if has_zero_points else zero_points))

    def find(self, dtypes: Mapping[str, str]) -> Iterator[StoredWeight]:
        yield from find_packed(dtypes, "weight_packed", self._needed, self._optional)

    def dequantise(
        self, weight: StoredWeight, parts: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        packed = parts["weight_packed"]
        check_dtype(weight, parts, "weight_packed", torch.int32)
        check_dimensions(weight, parts, "weight_packed")
        check_shape(weight, parts, "weight_shape", [2])
        num_rows, num_columns = (int(size) for size in parts["weight_shape"])
        bits = find_bits(weight, "weight_packed", packed.shape[1], num_columns, self._bits)
        check_shape(weight, parts, "weight_packed", [num_rows, num_words(num_columns, bits)])
        scale = parts["weight_scale"]
        if scale.numel() == 1:
            scale = scale.reshape(1, 1).expand(num_rows, 1)
        if scale.ndim != 2 or len(scale) != num_rows:
            raise MalformedWeights(
                f"{weight.parts['weight_scale']} is {list(scale.shape)}, and not [{num_rows}, groups]"
            )
        groups = self._groups(weight, parts, scale.shape[1], num_columns)
        numbers = unpack(packed, bits)[:, :num_columns]
        zeros = self._zeros(weight, parts, bits, num_rows, scale.shape[1])
        return dequantise_groups(numbers, zeros, scale, groups, dtype, bits)

    def _groups(
        self, weight: StoredWeight, parts: Mapping[str, torch.Tensor], num_groups: int, num_columns: int
    ) -> torch.Tensor:
        """Return the group of each column, int64."""
        in_order = groups_of_columns(
            weight, "weight_scale", num_groups, num_columns, self._group_sizes, parts["weight_packed"].device
        )
        groups = parts.get("weight_g_idx")
        if groups is None or (groups == -1).any():
            return in_order
        check_shape(weight, parts, "weight_g_idx", [num_columns])
        check_groups(weight, "weight_g_idx", groups, num_groups)
        return groups.long()

    def _zeros(
        self, weight: StoredWeight, parts: Mapping[str, torch.Tensor], bits: int, num_rows: int, num_groups: int
    ) -> torch.Tensor | None:
        """Return the zero points [N, groups] int32, raised as the numbers are, or None."""
        zeros = parts.get("weight_zero_point")
        if zeros is None:
            return None
        check_dtype(weight, parts, "weight_zero_point", torch.int32, torch.int8)
        if zeros.dtype == torch.int8:
            check_shape(weight, parts, "weight_zero_point", [num_rows, num_groups])
            return zeros.int() + (1 << (bits - 1))
        check_shape(weight, parts, "weight_zero_point", [num_words(num_rows, bits), num_groups])
        return unpack(zeros.t(), bits)[:, :num_rows].t()
