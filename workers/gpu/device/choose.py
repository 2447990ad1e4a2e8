"""Chooses the device by its name in the configuration."""

from __future__ import annotations

from typing import Any

import torch

from ipc.errors import ConfigError
from workers.gpu.device.base import Device
from workers.gpu.device.cpu import CpuDevice


def make_device(name: str) -> Device[Any, Any]:
    """Return the device for `name`, a value of `model.device`. Raises ConfigError for "cuda" without a usable CUDA
    GPU."""
    has_cuda = name != "cpu" and torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ConfigError(
            f'model.device ("cuda"): torch {torch.__version__} finds no CUDA GPU that it can use; set it to "cpu", or '
            "install a torch built for this machine's driver"
        )
    if not has_cuda:
        return CpuDevice()
    from workers.gpu.device.cuda import CudaDevice  # needs triton, which a machine without CUDA may lack

    return CudaDevice()
