"""Dependent launch of the kernels that torch's inductor writes. Importing this module takes about a second.

Inductor (torch 2.13) makes a kernel wait only if it uses a tensor that the kernel in front uses. A kernel that
fills a new tensor does not wait. But the new tensor may lie in memory that the kernel in front still reads as another
tensor, because inductor gives memory away as soon as its last use is launched. So a kernel here waits before it writes.
"""

from __future__ import annotations

import re
from typing import Any, Final

import torch
from torch._inductor import config
from torch._inductor.codegen.triton import TritonKernel

_WRITE: Final = re.compile(r"\.store\(|\.atomic_\w+\(")
_TAG: Final = "ringfeed: waits before writes"  # else code that plain inductor kept on disk would serve
_filter_waits: Any = getattr(TritonKernel, "_filter_pdl", None)  # inductor's own: leaves the first wait of a kernel


def let_compiled_kernels_start_early() -> None:
    """Use dependent launch in all code that inductor writes from now on, and mark it so for torch's cache, after what
    marks it already. The device must support it.

    Changes nothing if this torch writes its waits in another way.
    """
    if _filter_waits is None:
        return
    config.triton.enable_pdl = True
    TritonKernel._filter_pdl = filter_waits  # type: ignore[method-assign, assignment]
    torch.compiler.config.cache_key_tag += f"; {_TAG}"


def filter_waits(kernel: Any, code: Any) -> None:
    """Replaces inductor's method of the same purpose: also lets a kernel that would write before it waits wait first.

    `code` is an IndentedBuffer with the kernel's body.
    """
    if kernel._enable_pdl_codegen():
        lines = [str(getattr(line, "line", line)) for line in code._lines]
        first_wait = next((i for i, line in enumerate(lines) if kernel.GDC_WAIT in line), len(lines))
        if any(_WRITE.search(line) for line in lines[:first_wait]):
            code._lines.insert(0, kernel.GDC_WAIT)
    _filter_waits(kernel, code)
