"""Loads the model that a recording was made with, and finds what is not as it was."""

from __future__ import annotations

import gc

import torch
from msgspec import structs

from ipc.errors import ConfigError
from workers.gpu.model.fingerprint import fingerprint
from workers.gpu.recording.frames import SegmentStart
from workers.gpu.recording.segment import device_name, layout_hashes, versions
from workers.gpu.worker import Loaded, Report, load


def load_recorded(
    start: SegmentStart, path: str | None, device: str | None, progress: Report
) -> tuple[Loaded, list[str]]:
    """Load the model of a segment from `path` (None = where it was), on `device` (None = as configured).

    Returns it, and a line for each thing that may change its results: another device, another version of torch. Raises
    ConfigError if it is another model, or if this version of ringfeed has other records.
    """
    found = layout_hashes(start.shape)
    if other := sorted(name for name in found | start.layouts if found.get(name) != start.layouts.get(name)):
        raise ConfigError(f"has records ({', '.join(other)}) of another version of ringfeed")
    model = structs.replace(start.model, null_step_ms=0.0, profile_path=None)
    if path is not None:
        model = structs.replace(model, path=path)
    if device is not None:
        model = structs.replace(model, device=device)
    config_sha256, weights_sha256 = fingerprint(model)
    if (config_sha256, weights_sha256) != (start.config_sha256, start.weights_sha256):
        what = "config.json" if config_sha256 != start.config_sha256 else "names and sizes of weight files"
        raise ConfigError(
            f"was recorded with another model: {what} of {model.path} differ: give the right folder (--model)"
        )
    if model.load_format != "null" and start.device == "cpu":
        model = structs.replace(model, num_threads=start.num_threads)
    gc.collect()  # the model of the segment before
    torch.cuda.empty_cache()  # does nothing without CUDA
    loaded = load(progress, model, start.cache, start.shape, num_blocks=start.num_blocks)
    here = {"device": device_name(loaded.device.torch_device), **versions()}
    there = {"device": start.device, **start.versions}
    return loaded, [
        f"{name}: {there.get(name)} when it was recorded, {value} here"
        for name, value in here.items()
        if there.get(name) != value
    ]
