"""Programmatic dependent launch: a kernel may start before the kernel in front of it has ended.

Each kernel that is launched so waits for the kernel in front (`gdc_wait`) before it reads or writes what others write,
and lets the next kernel start (`gdc_launch_dependents`) only after that. Then all that was written before the kernel in
front is complete when a kernel starts. A kernel that lets the next one start earlier would break this for kernels that
torch compiles, which read older results without waiting.
"""

from __future__ import annotations

from functools import cache

import torch


@cache
def is_dependent_launch_possible(device: torch.device) -> bool:
    """Whether the device supports it: compute capability 9 and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(*, dependent: bool) -> dict[str, bool]:
    """The options of a Triton launch that may start early."""
    return {"launch_pdl": True} if dependent else {}
