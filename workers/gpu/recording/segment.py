"""What the first frame of a segment says about its process."""

from __future__ import annotations

import importlib.metadata
import platform
import time

import torch

from ipc.long_values import long_layout
from ipc.mask_records import mask_layout
from ipc.records import StepShape, result_layout, step_layout
from workers.gpu.config import GpuBootstrap
from workers.gpu.model.fingerprint import fingerprint
from workers.gpu.recording.frames import SegmentStart

_PACKAGES = ("ringfeed", "torch", "transformers")


def segment_start(bootstrap: GpuBootstrap, num_blocks: int, device: torch.device) -> SegmentStart:
    """Of the process with this bootstrap, after its model is loaded. Raises ConfigError if a model file is missing."""
    config_sha256, weights_sha256 = fingerprint(bootstrap.model)
    return SegmentStart(
        model=bootstrap.model,
        cache=bootstrap.cache,
        shape=bootstrap.shape,
        depth=bootstrap.depth,
        num_blocks=num_blocks,
        layouts=layout_hashes(bootstrap.shape),
        config_sha256=config_sha256,
        weights_sha256=weights_sha256,
        device=device_name(device),
        num_threads=torch.get_num_threads(),
        versions=versions(),
        epoch=bootstrap.worker.epoch,
        started_s=time.time(),
    )


def layout_hashes(shape: StepShape) -> dict[str, int]:
    """The hash of each layout whose bytes a recording holds, by its name."""
    layouts = step_layout(shape), result_layout(shape), long_layout(shape), mask_layout(shape)
    return {layout.name: layout.hash() for layout in layouts}


def device_name(device: torch.device) -> str:
    """ "cpu", or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def versions() -> dict[str, str]:
    """The versions of what computes tokens, by name, and the processor's kind."""
    found = {"processor": platform.machine()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found
