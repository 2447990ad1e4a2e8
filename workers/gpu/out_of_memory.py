"""Says what the process was doing when a device's memory ran out, with the numbers and the cure.

Knows the stages from the progress that is reported anyway, so that whoever works need not think of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Final

import torch

from workers.gpu.config import GpuBootstrap
from workers.gpu.memory import GIB, MemoryUse, free_text

LOADING: Final = "loading weights"
SERVING: Final = "running a step"
_LONGEST: Final = 200  # of what another library says
_SIGNS: Final = re.compile("out of memory|can't allocate memory|ALLOC_FAILED")  # torch's, CUDA's, Triton's, cuBLAS's
_ASKED: Final = re.compile(r"[Tt](ried to allocate [\d.]+ \w+)")


class Stages:
    """What the process is doing. `progress` is passed on to `report`."""

    def __init__(self, report: Callable[[str, float, int], None]) -> None:
        self._report = report
        self._stage = "starting"
        self._far = ""

    def progress(self, stage: str, fraction: float, total_bytes: int = 0) -> None:
        self._stage = stage
        self._far = f", {fraction:.0%}{f' of {total_bytes / GIB:.2f} GiB' if total_bytes else ''} done"
        self._report(stage, fraction, total_bytes)

    def serve(self) -> None:
        """Start-up is over."""
        self._stage, self._far = SERVING, ""

    def out_of_memory(self, error: Exception, bootstrap: GpuBootstrap, use: MemoryUse) -> str:
        """One line. `use`: as far as it is known."""
        device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")  # type: ignore[no-untyped-call]
        asked = _ASKED.search(str(error))
        parts = [
            f"out of memory while {self._stage}{self._far}: {free_text(device)} on {device}",
            *([str(use)] if use != MemoryUse() else []),
            "t" + asked[1] if asked else " ".join(str(error).split())[:_LONGEST],
        ]
        return f"{'; '.join(parts)}. {self._cure(bootstrap)}"

    def _cure(self, bootstrap: GpuBootstrap) -> str:
        if self._stage == LOADING:
            return "Use a smaller model or model.dtype, or end what else uses this memory"
        cache, shape = bootstrap.cache, bootstrap.shape
        key = "memory_share" if cache.num_blocks is None else "num_blocks"
        return (
            f"Lower cache.{key} ({getattr(cache, key)}), "
            f"scheduler.max_num_batched_tokens ({shape.max_num_batched_tokens}) or "
            f"scheduler.max_num_seqs ({shape.max_num_seqs})"
        )


def is_out_of_memory(error: Exception) -> bool:
    """Whether this error, or one that it came of, says that memory ran out."""
    return any(
        isinstance(each, torch.OutOfMemoryError | MemoryError)
        or (isinstance(each, RuntimeError) and _SIGNS.search(str(each)) is not None)
        for each in _causes(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
