"""Triton kernels, compiled for a GPU on a machine without one.

The interpreter runs what a compiler refuses, and does not show what a conversion costs.
"""

from __future__ import annotations

import inspect
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

HOPPER = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


class Launches:
    """Stands for a kernel, and keeps the arguments of its launches."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self._calls.append((args, kwargs))

    def ptx(self) -> str:
        """Compile for the arguments of the only launch."""
        ((args, given_by_name),) = self._calls
        kwargs = dict(given_by_name)
        parameters = list(inspect.signature(self._kernel.fn).parameters.values())
        names = [parameter.name for parameter in parameters]
        given = dict(zip(names, args, strict=False)) | {name: kwargs.pop(name) for name in names if name in kwargs}
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(parameters):
            value = given[parameter.name]
            if value is None or "constexpr" in str(parameter.annotation):
                signature[parameter.name] = "constexpr"
                constants[index,] = value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = f"*{TYPES[value.dtype]}"
                attributes[index,] = [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
                if isinstance(value, int) and value % 16 == 0:
                    attributes[index,] = [["tt.divisibility", 16]]
        compiled = compile(ASTSource(self._kernel, signature, constants, attributes), target=HOPPER, options=kwargs)
        return str(compiled.asm["ptx"])


def spilled_bytes(ptx: str) -> int:
    """The bytes of registers that one thread of a kernel writes to memory, because a GPU has too few."""
    with TemporaryDirectory() as folder:
        (file := Path(folder) / "kernel.ptx").write_text(ptx)
        done = subprocess.run(
            [knobs.nvidia.ptxas.path, "-arch=sm_90a", "-v", file, "-o", file.with_suffix(".cubin")],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
    return max(int(count) for count in re.findall(r"(\d+) bytes spill stores", done.stderr))


def waits_before_it_lets_others_start(ptx: str) -> bool:
    """Whether a kernel keeps the rule of `workers/gpu/device/dependent_launch.py`."""
    wait, launch = ptx.find("griddepcontrol.wait"), ptx.find("griddepcontrol.launch_dependents")
    return 0 <= wait < launch
