"""Tests of Triton kernels under its interpreter, which is chosen for a whole process when Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import psutil
import torch

_LOWEST: Final = 19


def start_under_interpreter(tests: Path) -> subprocess.Popen[str]:
    """Start a file of tests in a separate process, with the lowest priority. Its whole output is in its stdout."""
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(tests)],
        cwd=root, env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    psutil.Process(process.pid).nice(_LOWEST)
    return process


def let_scalars_end_ranges() -> None:
    """Triton 3.6 holds scalars as arrays of one element, which numpy >= 2.4 no longer takes for the ends of a range."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor_and_index


def convert_e4m3_as_gpus_do() -> None:
    """Let the interpreter convert float8_e4m3fn as torch does. Its own conversion knows no NaN, loses carries and wraps
    at overflow; tests on a GPU compare that of the GPU with torch's."""
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float
    numbers = {tl.float16: torch.float16, tl.float32: torch.float32}

    def convert_e4m3(source: Any, old: Any, new: Any, rounding: Any) -> Any:
        old, new = old.scalar, new.scalar
        if old == tl.float8e4nv and new in numbers:
            return torch.from_numpy(source).view(torch.float8_e4m3fn).to(numbers[new]).numpy()
        if old in numbers and new == tl.float8e4nv:
            return torch.from_numpy(source).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return convert(source, old, new, rounding)

    interpreter._convert_float = convert_e4m3
