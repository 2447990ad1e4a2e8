"""How many descriptors this process and its children may have open (`ulimit -n`)."""

from __future__ import annotations

import os
import resource
from typing import Final

from ipc.errors import EngineUnavailable

_NUM_NEEDED: Final = 160  # by the engine's process that needs most, with room for a few clients
_NUM_PER_TOKENIZER: Final = 8


def raise_descriptor_limit() -> None:
    """Raise the soft limit to the hard limit. Processes started after this, the workers, inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def check_descriptor_limit(num_tokenizers: int) -> None:
    """Raise EngineUnavailable if the limit leaves too few descriptors for an engine to start."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    num_open = len(os.listdir("/proc/self/fd"))
    needed = _NUM_NEEDED + _NUM_PER_TOKENIZER * num_tokenizers
    if limit - num_open < needed:
        raise EngineUnavailable(
            f"a process may open {limit} files (ulimit -n) and {num_open} are open already; this engine needs {needed} "
            "more: raise the limit"
        )
