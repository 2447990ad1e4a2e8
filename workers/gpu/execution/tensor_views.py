"""Views of a record's fields in device memory: what `Layout.views` is to numpy, for tensors."""

from __future__ import annotations

from typing import Any, Final, TypeVar

import torch

from ipc.record_layout import Field, Layout, make_record
from ipc.records import ResultFields, StepFields

StepTensors = StepFields[torch.Tensor]
ResultTensors = ResultFields[torch.Tensor]

T = TypeVar("T")

_DTYPES: Final = {"<i4": torch.int32, "<i8": torch.int64, "<f4": torch.float32}


def tensor_views(kind: type[T], layout: Layout[Any], memory: torch.Tensor) -> T:
    """A record of class `kind`, the layout's record class with tensors as arrays.

    Each field aliases `memory` [layout.num_bytes] uint8.
    """
    return make_record(layout, kind, lambda field: tensor_view(field, memory))


def tensor_view(field: Field, memory: torch.Tensor) -> torch.Tensor:
    """The field's part of `memory`, in its dtype and shape."""
    return memory[field.offset : field.offset + field.num_bytes].view(_DTYPES[field.dtype.str]).view(field.shape)
