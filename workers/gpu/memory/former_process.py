"""Waits until the device's memory of a former GPU process has returned.

The driver frees a dead process's memory a while after its death. A process that takes its place needs as much as the
former one took, because it allocates the same weights, KV blocks and graphs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from ipc.errors import ConfigError
from workers.gpu.startup_stages import WAITING_FOR_MEMORY

TIMEOUT_S: Final = 60.0
_LOOK_S: Final = 0.05
_GIB: Final = 1 << 30


def wait_for_memory(
    needed_bytes: int,
    free_bytes: Callable[[], int],
    progress: Callable[[str, float], None],
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Return once `free_bytes()` of the device's memory are at least `needed_bytes`. Reports the stage if it must wait.

    Raises ConfigError after TIMEOUT_S: another program has taken the memory.
    """
    deadline = clock() + TIMEOUT_S
    while (free := free_bytes()) < needed_bytes:
        if clock() >= deadline:
            raise ConfigError(
                f"{free / _GIB:.2f} GiB of the device are free, and the first start took "
                f"{needed_bytes / _GIB:.2f} GiB, which have not returned within {TIMEOUT_S:g} s. "
                "End other programs that use this device"
            )
        progress(WAITING_FOR_MEMORY, free / needed_bytes)
        sleep(_LOOK_S)
