"""The interface of the formats of quantised weights, and the code that several of them use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch

from workers.gpu.products.int4 import scale_of

_WORD_BITS: Final = 32
_HELD_BITS: Final = 4  # by our products


class MalformedWeights(ValueError):
    """The tensors of a quantised weight are incomplete or do not fit together. `fault` names one of them."""

    def __init__(self, fault: str) -> None:
        super().__init__(f"{fault}: download the model again, or use an unquantised checkpoint of it")


@dataclass(frozen=True)
class StoredWeight:
    """The tensors that make one weight."""

    name: str  # of the weight in an unquantised checkpoint
    parts: Mapping[str, str]  # the format's name for a part -> the tensor's name in the files
    ignored: tuple[str, ...] = ()  # tensors that belong to the weight and that we do not use


class StoredFormat(Protocol):
    """A way to store quantised weights. One object serves all weights of a checkpoint, from any thread."""

    def find(self, dtypes: Mapping[str, str]) -> Iterator[StoredWeight]:
        """Find the weights of this format among the tensors of the files, given with safetensors' names of dtypes.

        Raises MalformedWeights if a weight lacks a part.
        """
        ...

    def dequantise(
        self, weight: StoredWeight, parts: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the weight in `dtype`, usually [N, K], computed in float32 on the device of its parts.

        Returns also the scale of the weight, if our products hold it as the file does: for float8 e4m3, [N] float32
        with one scale for each row or for all, or [ceil(N / 128), K / 128] for blocks, see `products.fp8`; for 4 bits,
        [1 or 2, N, groups], see `products.int4`. Rounding the weight by this scale gives the numbers of the file again.
        Raises MalformedWeights.
        """
        ...


def find_packed(
    dtypes: Mapping[str, str], key: str, needed: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[StoredWeight]:
    """Find the weights of linear layers whose parts are `<module>.<part>`. Those with a part `key` are quantised."""
    for name in dtypes:
        module, _, part = name.rpartition(".")
        if part != key:
            continue
        for other in needed:
            if f"{module}.{other}" not in dtypes:
                raise MalformedWeights(f"the files lack {module}.{other}, a part of the quantised weight {name}")
        present = [other for other in optional if f"{module}.{other}" in dtypes]
        yield StoredWeight(f"{module}.weight", {each: f"{module}.{each}" for each in (key, *needed, *present)})


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the unsigned numbers of `bits` bits in int32 `words` [..., W], lowest bits first, as int32
    [..., W * 32 / bits]."""
    shifts = torch.arange(0, _WORD_BITS, bits, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)


def num_words(count: int, bits: int) -> int:
    """The words that hold `count` numbers of `bits` bits."""
    return -(-count * bits // _WORD_BITS)


def check_shape(weight: StoredWeight, parts: Mapping[str, torch.Tensor], part: str, shape: Sequence[int]) -> None:
    """Raise MalformedWeights unless a part has this shape."""
    stored = list(parts[part].shape)
    if stored != list(shape):
        raise MalformedWeights(
            f"{weight.parts[part]} is {stored}, but the other parts of {weight.name} need {list(shape)}"
        )


def check_dtype(weight: StoredWeight, parts: Mapping[str, torch.Tensor], part: str, *dtypes: torch.dtype) -> None:
    """Raise MalformedWeights unless a part has one of these dtypes."""
    if parts[part].dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        stored = str(parts[part].dtype).removeprefix("torch.")
        raise MalformedWeights(f"{weight.parts[part]} is stored as {stored}, and not as {names}")


def check_dimensions(weight: StoredWeight, parts: Mapping[str, torch.Tensor], *matrices: str) -> None:
    """Raise MalformedWeights unless these parts have two dimensions."""
    for part in matrices:
        if parts[part].ndim != 2:
            raise MalformedWeights(f"{weight.parts[part]} is {list(parts[part].shape)}, and not a matrix")


def find_bits(weight: StoredWeight, part: str, words: int, count: int, declared: Sequence[int]) -> int:
    """Return which of the declared numbers of bits stores `count` numbers in `words` words. Raises MalformedWeights."""
    for bits in declared:
        if num_words(count, bits) == words:
            return bits
    raise MalformedWeights(
        f"{weight.parts[part]} holds {words} words of 32 bits for {count} numbers, which config.json's bits "
        f"({' or '.join(map(str, declared))}) do not explain"
    )


def groups_of_columns(
    weight: StoredWeight, part: str, num_groups: int, num_columns: int, declared: Sequence[int], device: torch.device
) -> torch.Tensor:
    """Return the group of each of `num_columns` columns, int64, if these are in groups of equal size, in order.

    `declared` has the group sizes of config.json; -1 is one group for all columns. Raises MalformedWeights if none of
    them gives `num_groups` groups.
    """
    for size in declared:
        size = num_columns if size == -1 else size
        if -(-num_columns // size) == num_groups:
            return torch.arange(num_columns, device=device) // size
    raise MalformedWeights(
        f"{weight.parts[part]} has {num_groups} groups for {num_columns} columns, which config.json's group sizes "
        f"({' or '.join(map(str, declared))}) do not explain"
    )


def check_groups(weight: StoredWeight, part: str, groups: torch.Tensor, num_groups: int) -> None:
    """Raise MalformedWeights for a part that names groups that do not exist."""
    if groups.numel() and not 0 <= int(groups.min()) <= int(groups.max()) < num_groups:
        raise MalformedWeights(
            f"{weight.parts[part]} names the groups {int(groups.min())} to {int(groups.max())} of {num_groups}"
        )


def dequantise_groups(
    numbers: torch.Tensor,
    zeros: torch.Tensor | None,
    scales: torch.Tensor,
    groups: torch.Tensor,
    dtype: torch.dtype,
    bits: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return (numbers - zeros) * scales in `dtype`, computed in float32, [N, K], and their scale if our products hold
    them in 4 bits; see `StoredFormat.dequantise`.

    `numbers` [N, K] int32, from 0 to 2^bits - 1; `zeros` [N, G] int32 (None: 2^(bits - 1)) and `scales` [N, G] of each
    group; `groups` [K] int64, the group of each column.
    """
    num_columns, num_groups = len(groups), scales.shape[1]
    numbers = numbers - (1 << (bits - 1) if zeros is None else zeros[:, groups])
    values = (numbers * scales.float()[:, groups]).to(dtype).contiguous()
    in_order = torch.arange(num_columns, device=groups.device) // max(num_columns // num_groups, 1)
    is_held = bits == _HELD_BITS and torch.equal(groups, in_order)
    return values, scale_of(scales, zeros, values) if is_held else None
