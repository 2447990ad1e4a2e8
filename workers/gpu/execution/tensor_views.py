"""Views of a record's fields in device memory: what `Layout.views` is to numpy, for tensors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Final

import torch

from ipc.record_layout import Layout

_DTYPES: Final = {"<i4": torch.int32, "<i8": torch.int64, "<f4": torch.float32}


def views(layout: Layout, record: torch.Tensor) -> Any:
    """One tensor per field, each aliasing `record` [layout.num_bytes] uint8."""
    return SimpleNamespace(**{
        f.name: record[f.offset : f.offset + f.num_bytes].view(_DTYPES[f.dtype.str]).view(f.shape)
        for f in layout.fields.values()
    })  # fmt: skip


def prefix_bytes(layout: Layout, field: str) -> int:
    """Bytes of everything in front of a field."""
    return layout.fields[field].offset
