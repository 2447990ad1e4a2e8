"""Recognises errors that mean "out of memory", and writes the message for them: the stage, the numbers and the cure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

import torch

from workers.gpu.config import GpuBootstrap
from workers.gpu.memory.account import MemoryUse, free_text
from workers.gpu.startup_stages import LOADING, Stages

_LONGEST: Final = 200  # characters of another library's message
_SIGNS: Final = re.compile("out of memory|can't allocate memory|ALLOC_FAILED")  # of torch, CUDA, Triton, cuBLAS
_ASKED: Final = re.compile(r"[Tt](ried to allocate [\d.]+ \w+)")


def is_out_of_memory(error: Exception) -> bool:
    """Return whether this error, or one of its causes, says that memory ran out."""
    return any(
        isinstance(each, torch.OutOfMemoryError | MemoryError)
        or (isinstance(each, RuntimeError) and _SIGNS.search(str(each)) is not None)
        for each in _causes(error)
    )


def out_of_memory_text(error: Exception, stages: Stages, bootstrap: GpuBootstrap, use: MemoryUse) -> str:
    """Return the error message, in one line. `use`: the memory use as far as it is known."""
    device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")  # type: ignore[no-untyped-call]
    asked = _ASKED.search(str(error))
    parts = [
        f"out of memory while {stages}: {free_text(device)} on {device}",
        *([str(use)] if use != MemoryUse() else []),
        "t" + asked[1] if asked else " ".join(str(error).split())[:_LONGEST],
    ]
    return f"{'; '.join(parts)}. {_cure(stages.name, bootstrap)}"


def _cure(stage: str, bootstrap: GpuBootstrap) -> str:
    if stage == LOADING:
        return "Use a smaller model or model.dtype, or end other programs that use this memory"
    cache, shape = bootstrap.cache, bootstrap.shape
    key = "memory_share" if cache.num_blocks is None else "num_blocks"
    return (
        f"Lower cache.{key} ({getattr(cache, key)}), "
        f"scheduler.max_num_batched_tokens ({shape.max_num_batched_tokens}) or "
        f"scheduler.max_num_seqs ({shape.max_num_seqs})"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
