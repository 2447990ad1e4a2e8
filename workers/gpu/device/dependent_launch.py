"""Whether kernels may start before the kernel in front has ended."""

from __future__ import annotations

import torch


def is_dependent_launch_possible(device: torch.device) -> bool:
    """Whether the device supports programmatic dependent launch (compute capability 9 and later): a kernel may start
    before the kernel that it depends on has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
