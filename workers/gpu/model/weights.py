"""Reads a model's weights from safetensors straight to its device, one tensor at a time.

Owns where tensors come from, where they go, and the count of what was read. What they are called in the model, and
which of them are merged, split or tied, is transformers' own: it gets a state dict whose tensors are read when it asks
for one. (Its `device_map` does the same, but insists on the accelerate package.)

    file --mapped--> one tensor per thread of transformers' loader --copied--> device      then unmapped

So the host holds a few tensors at a time, whatever the size of the model, and nothing of a file stays mapped.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from workers.gpu.startup_stages import LOADING


class Progress(Protocol):
    """Is told what is being done and how much of it is done, 0 to 1; of how many bytes, where bytes are counted."""

    def __call__(self, stage: str, fraction: float, total_bytes: int = 0, /) -> None: ...


@dataclass(frozen=True)
class LoadReport:
    """What was read, and where files and model differ. Uses the model's names for tensors that it has."""

    read: set[str]  # tensors, by their names in the files
    missing: list[str]  # weights that the files lack; the model has random ones
    unexpected: list[str]  # tensors of the files that the model has no place for, and that its class does not ignore
    mismatched: list[tuple[str, list[int], list[int]]]  # of another shape; name, shape in the files, in the model
    narrow: dict[str, torch.dtype]  # tensors stored as integers or in 8 bits, and loaded as a wider dtype


def make_blank(model_config: Any) -> nn.Module:
    """The model of a transformers configuration without memory for its weights. The configuration stays as it is."""
    with torch.device("meta"):
        blank: nn.Module = AutoModelForCausalLM.from_config(copy.deepcopy(model_config), trust_remote_code=False)
    return blank


def read_weights(
    files: Sequence[Path], blank: Any, dtype: str, device: torch.device, progress: Progress
) -> tuple[nn.Module, LoadReport]:
    """Build the model that `blank` is one of on `device`; `dtype` "auto" = what its configuration says.

    Raises RuntimeError for a file that is no whole safetensors file, and what transformers raises.
    """
    counter = _Counter(sum(file.stat().st_size for file in files), progress)
    state_dict: dict[str, Any] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                names: list[str] = opened.keys()
        except SafetensorError as error:
            raise RuntimeError(
                f"{file.name} is incomplete, or no safetensors file ({error}): download it again"
            ) from None
        state_dict |= {name: _StoredTensor(file, name, device, counter) for name in names}
    with _reporting(counter):
        model, report = type(blank).from_pretrained(
            None, config=blank.config, state_dict=state_dict, dtype=dtype, output_loading_info=True,
            ignore_mismatched_sizes=True,  # its own error names none of them
        )  # fmt: skip
    on_device: nn.Module = model.to(device)  # what no file holds, such as RoPE's frequencies, is still on the CPU
    return on_device, LoadReport(
        read=counter.names,
        missing=sorted(report["missing_keys"]),
        unexpected=sorted(report["unexpected_keys"]),
        mismatched=[(name, list(stored), list(wanted)) for name, stored, wanted in sorted(report["mismatched_keys"])],
        narrow=counter.narrow,
    )


class _Counter:
    """Bytes read so far, counted by any thread and reported by one, in steps of a hundredth."""

    def __init__(self, total_bytes: int, progress: Progress) -> None:
        self._total_bytes = total_bytes
        self._progress = progress
        self._lock = threading.Lock()
        self._read_bytes = 0
        self._reported = 0
        self.names: set[str] = set()  # of tensors that were read; any thread adds to it and to `narrow`
        self.narrow: dict[str, torch.dtype] = {}  # tensors cast from a dtype that no model computes in

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self._read_bytes += num_bytes

    def report(self) -> None:
        percent = 100 * self._read_bytes // self._total_bytes
        if percent > self._reported:
            self._reported = percent
            self._progress(LOADING, percent / 100, self._total_bytes)


class _StoredTensor:
    """A tensor in a file, as transformers' loader takes one: asked for its data (`[...]`), then for a device and dtype.

    The loader, which knows of no device, says "cpu"; it goes to ours. Called by several threads, once for each tensor.
    """

    def __init__(self, file: Path, name: str, device: torch.device, counter: _Counter) -> None:
        self._file = file
        self._name = name
        self._device = device
        self._counter = counter

    def __getitem__(self, everything: EllipsisType) -> _StoredTensor:
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        with safe_open(self._file, framework="pt") as file:  # anew for each: its pages go when this mapping does
            stored: torch.Tensor = file.get_tensor(self._name)
            self._counter.add(stored.nbytes)
            self._counter.names.add(self._name)
            is_narrow = stored.itemsize == 1 or not stored.is_floating_point()
            if is_narrow and stored.ndim > 1 and dtype is not None and dtype.is_floating_point:
                self._counter.narrow[self._name] = stored.dtype
            return stored.to(device=self._device, dtype=dtype, copy=True)

    @property
    def dtype(self) -> torch.dtype:
        with safe_open(self._file, framework="pt") as file:
            dtype: torch.dtype = file.get_tensor(self._name).dtype  # maps it, and reads nothing
            return dtype

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point


@contextmanager
def _reporting(counter: _Counter) -> Iterator[None]:
    """Report while transformers loads, in its own thread, through the hook it has for progress bars of one's own."""

    def make_bar(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _CountedItems:
        return _CountedItems(args[0] if args else kwargs.get("iterable", ()), counter)

    outer = transformers_logging.set_tqdm_hook(make_bar)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(outer)


class _CountedItems:
    """Stands in for a tqdm bar: iterates, and has the counter report after each item."""

    def __init__(self, items: Iterable[Any], counter: _Counter) -> None:
        self._items = items
        self._counter = counter

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            yield item
            self._counter.report()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None  # close, update, set_description: nothing to draw

    def __enter__(self) -> _CountedItems:
        return self

    def __exit__(self, *_: object) -> None:
        pass
