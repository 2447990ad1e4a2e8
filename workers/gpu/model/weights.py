"""Reads a model's weights from safetensors straight to its device, one tensor at a time.

Owns where tensors come from, where they go, and the count of bytes read. transformers decides their names in the model,
and which of them it merges, splits or ties. It gets a state dict whose tensors are read when it accesses them. (Its
`device_map` does the same, but requires the accelerate package.)

    file --mapped--> one tensor per thread of transformers' loader --copied--> device      then unmapped

So the host holds only a few tensors at a time, for a model of any size, and no part of a file stays mapped. Quantised
weights are dequantised on the device as they are read (see `formats`), so transformers sees 16-bit ones.
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
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from workers.gpu.config import ModelConfig
from workers.gpu.memory.out_of_memory import is_out_of_memory
from workers.gpu.model.formats.stored_format import MalformedWeights, StoredFormat, StoredWeight
from workers.gpu.model.weight_files import weight_files
from workers.gpu.startup_stages import LOADING


class Progress(Protocol):
    """Reports a stage of loading: its name, the fraction that is done (0 to 1) and, if bytes are counted, their
    total."""

    def __call__(self, stage: str, fraction: float, total_bytes: int = 0, /) -> None: ...


@dataclass(frozen=True)
class LoadReport:
    """The tensors that were read, and the differences between files and model. Uses the model's names for its
    tensors."""

    read: set[str]  # tensors, by their names in the files
    missing: list[str]  # weights that the files lack; the model has random ones
    unexpected: list[str]  # tensors of the files without a place in the model, except known ones and biases of zeros
    mismatched: list[tuple[str, list[int], list[int]]]  # name, shape in the files, shape in the model
    narrow: dict[str, torch.dtype]  # tensors stored as integers or in 8 bits, and loaded as a wider dtype


def files_to_read(model: ModelConfig) -> list[Path]:
    """Return the files that hold the weights, at least one; none with load_format "dummy".

    Raises ConfigError, naming the first file that is missing or is only a Git LFS pointer.
    """
    if model.load_format == "dummy":
        return []
    is_folder = Path(model.path).is_dir()
    return weight_files(Path(model.path if is_folder else snapshot_download(model.path, local_files_only=True)))


def make_blank(model_config: Any) -> nn.Module:
    """Return the model of a transformers configuration, without memory for its weights. Does not change the
    configuration."""
    with torch.device("meta"):
        blank: nn.Module = AutoModelForCausalLM.from_config(copy.deepcopy(model_config), trust_remote_code=False)
    return blank


def read_weights(
    files: Sequence[Path], blank: Any, dtype: str, device: torch.device, progress: Progress,
    formats: Sequence[StoredFormat] = (),
) -> tuple[nn.Module, LoadReport]:  # fmt: skip
    """Build the model that `blank` describes on `device`. `dtype` "auto" = the dtype of its configuration.

    Dequantises weights that are stored in one of `formats`. Where rounding a linear layer's weight to float8 or to 4
    bits by the file's scale gives the file's numbers, the layer gets that scale as its attribute `weight_scale`; see
    `product.stored_scale`.

    Raises RuntimeError for a file that is not a complete safetensors file, MalformedWeights for quantised weights that
    cannot be read, and the errors of transformers.
    """
    counter = _Counter(sum(file.stat().st_size for file in files), progress)
    state_dict, dtypes = _tensors_of(files, device, counter)
    for stored_format in formats:
        _merge_parts(state_dict, dtypes, stored_format, counter)
    try:
        with _reporting(counter):
            model, report = type(blank).from_pretrained(
                None, config=blank.config, state_dict=state_dict, dtype=dtype, output_loading_info=True,
                ignore_mismatched_sizes=True,  # transformers' own error does not name them
            )  # fmt: skip
    except Exception:
        if counter.malformed:
            raise counter.malformed[0] from None  # transformers has only written it into a report
        raise
    on_device: nn.Module = model.to(device)  # moves tensors that are in no file, such as RoPE's frequencies
    _keep_scales(on_device)
    return on_device, LoadReport(
        read=set(counter.names),  # without the biases that are read below
        missing=sorted(report["missing_keys"]),
        unexpected=sorted(name for name in report["unexpected_keys"] if not _is_zero_bias(name, state_dict)),
        mismatched=[(name, list(stored), list(wanted)) for name, stored, wanted in sorted(report["mismatched_keys"])],
        narrow=counter.narrow,
    )


def _tensors_of(
    files: Sequence[Path], device: torch.device, counter: _Counter
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a state dict of all tensors of these files, and safetensors' names of their dtypes. Reads only headers."""
    state_dict: dict[str, Any] = {}
    dtypes: dict[str, str] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                names: list[str] = opened.keys()
                dtypes |= {name: opened.get_slice(name).get_dtype() for name in names}
        except SafetensorError as error:
            raise RuntimeError(
                f"{file.name} is incomplete, or not a safetensors file ({error}): download it again"
            ) from None
        state_dict |= {name: _StoredTensor(file, name, device, counter) for name in names}
    return state_dict, dtypes


def _keep_scales(model: nn.Module) -> None:
    """Give each linear layer the scale that `_QuantisedTensor` left at its weight."""
    for module in model.modules():
        scale = getattr(module.weight, "stored_scale", None) if type(module) is nn.Linear else None
        if scale is not None:
            module.weight_scale = scale


def _is_zero_bias(name: str, state_dict: dict[str, Any]) -> bool:
    """Whether a tensor is a bias of zeros of a quantised layer. AutoGPTQ's older versions write it for layers without a
    bias."""
    if not name.endswith(".bias") or name not in state_dict:
        return False
    weight = state_dict.get(name.removesuffix("bias") + "weight")
    return isinstance(weight, _QuantisedTensor) and not state_dict[name].to().any()


def _merge_parts(
    state_dict: dict[str, Any], dtypes: dict[str, str], stored_format: StoredFormat, counter: _Counter
) -> None:
    """Replace the parts of each weight of a format by one tensor in the state dict. Raises MalformedWeights."""
    for weight in stored_format.find(dtypes):
        parts = {part: state_dict.pop(name) for part, name in weight.parts.items()}
        for name in weight.ignored:
            del state_dict[name]
        if weight.name in state_dict:
            raise MalformedWeights(f"the files hold {weight.name} twice: whole, and quantised")
        state_dict[weight.name] = _QuantisedTensor(stored_format, weight, parts, counter)


class _Counter:
    """Counts the bytes read so far. Any thread may count; one thread reports, at most once per percent."""

    def __init__(self, total_bytes: int, progress: Progress) -> None:
        self._total_bytes = total_bytes
        self._progress = progress
        self._lock = threading.Lock()
        self._read_bytes = 0
        self._reported = 0
        self.names: set[str] = set()  # tensors that were read; any thread adds to it and to `narrow`
        self.narrow: dict[str, torch.dtype] = {}  # tensors cast from a dtype that no model computes in
        self.dequantising = threading.Lock()  # one weight at a time, because it takes several times its memory
        self.malformed: list[MalformedWeights] = []  # quantised weights that could not be read

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self._read_bytes += num_bytes

    def report(self) -> None:
        percent = 100 * self._read_bytes // self._total_bytes
        if percent > self._reported:
            self._reported = percent
            self._progress(LOADING, percent / 100, self._total_bytes)


class _StoredTensor:
    """A tensor in a file, with the methods that transformers' loader calls: `[...]` for its data, then `to` a device
    and dtype.

    The loader passes "cpu", because it knows no device; the tensor goes to our device. Several threads call this, once
    per tensor.
    """

    def __init__(self, file: Path, name: str, device: torch.device, counter: _Counter) -> None:
        self._file = file
        self._name = name
        self._device = device
        self._counter = counter

    def __getitem__(self, everything: EllipsisType) -> _StoredTensor:
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        # A new mapping for each tensor, so that its pages are released afterwards.
        with safe_open(self._file, framework="pt") as file:
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
            dtype: torch.dtype = file.get_tensor(self._name).dtype  # maps the tensor without reading it
            return dtype

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point


class _QuantisedTensor:
    """A weight whose parts are tensors in files, with the same methods. Its parameter keeps the scale of its rows."""

    def __init__(
        self, stored_format: StoredFormat, weight: StoredWeight, parts: dict[str, _StoredTensor], counter: _Counter
    ) -> None:
        self._format = stored_format
        self._weight = weight
        self._parts = parts
        self._counter = counter

    def __getitem__(self, everything: EllipsisType) -> _QuantisedTensor:
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> nn.Parameter:
        parts = {part: tensor.to() for part, tensor in self._parts.items()}
        try:
            with self._counter.dequantising:
                values, scale = self._format.dequantise(self._weight, parts, dtype or self.dtype)
        except MalformedWeights as error:
            self._counter.malformed.append(error)
            raise
        except (IndexError, RuntimeError) as error:  # parts that do not fit together in another way
            if not is_out_of_memory(error):
                fault = f"{self._weight.name} cannot be made of its parts ({' '.join(str(error).split())[:200]})"
                self._counter.malformed.append(MalformedWeights(fault))
            raise
        parameter = nn.Parameter(values, requires_grad=False)
        parameter.stored_scale = scale  # type: ignore[attr-defined]
        return parameter

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    def is_floating_point(self) -> bool:
        return False  # transformers looks for the model's dtype among tensors that are


@contextmanager
def _reporting(counter: _Counter) -> Iterator[None]:
    """Report progress while transformers loads, in its own thread, through its hook for custom progress bars."""

    def make_bar(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _CountedItems:
        return _CountedItems(args[0] if args else kwargs.get("iterable", ()), counter)

    outer = transformers_logging.set_tqdm_hook(make_bar)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(outer)


class _CountedItems:
    """Replaces a tqdm bar: iterates, and lets the counter report after each item."""

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
