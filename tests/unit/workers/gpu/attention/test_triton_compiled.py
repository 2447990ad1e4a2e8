"""The attention kernels, compiled for a GPU on a machine without one.

The interpreter runs what a compiler refuses, and does not show what a conversion costs.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.reference.paged_attention import make_paged_step, run_backend

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from workers.gpu.attention import triton_backend
from workers.gpu.attention.triton_backend import Tuning
from workers.gpu.attention.triton_kv_write import _write_kv, write_kv

pytestmark = pytest.mark.slow

HOPPER = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


class Launches:
    """Stands for a kernel, and keeps the arguments of its launches."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self._calls.append((args, kwargs))

    def ptx(self) -> str:
        """Compile for the arguments of the only launch."""
        ((args, kwargs),) = self._calls
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


@pytest.mark.parametrize("scales", [None, (0.02, 3.0)], ids=["16 bits", "8 bits"])
def test_attention_compiles_for_a_gpu_and_converts_8_bits_in_few_instructions(
    scales: tuple[float, float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = {name: Launches(getattr(triton_backend, name)) for name in ("decode", "combine", "prefill")}
    for name, launches in kernels.items():
        monkeypatch.setattr(triton_backend, name, launches)
    plan = torch.zeros(8, 8, dtype=torch.int32)
    monkeypatch.setattr(triton_backend, "plan_decodes", lambda *_, **__: (plan, plan))
    monkeypatch.setattr(triton_backend, "plan_tiles", lambda *_: plan)
    step = make_paged_step(
        [(1, 30), (3, 5)], num_heads=8, num_kv_heads=2, head_dim=128, head_dim_v=80, block_size=16,
        dtype=torch.bfloat16, scales=scales,
    )  # fmt: skip
    backend = triton_backend.TritonBackend(
        Tuning(positions=128 if scales else 64, warps=4, stages=2), Tuning(positions=64, warps=8, stages=2, rows=128)
    )
    run_backend(backend, step, scaling=0.1, softcap=5.0, sinks=torch.zeros(8, dtype=torch.bfloat16))
    ptx = {name: launches.ptx() for name, launches in kernels.items()}
    assert "mma.sync" in ptx["decode"]
    assert "wgmma" in ptx["prefill"]
    assert ptx["combine"]
    for name in ("decode", "prefill"):
        assert ("cvt.rn.f16x2.e4m3x2" in ptx[name]) == (scales is not None)
        assert "cvt.rn.bf16.f16" not in ptx[name], "slow: this conversion runs in another unit"
    assert not re.search(r"ld\.shared\.[bu]8", ptx["decode"]), "a thread reads V byte by byte"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_the_write_of_kv_compiles_for_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches(_write_kv)
    monkeypatch.setattr("workers.gpu.attention.triton_kv_write._write_kv", launches)
    numbers = torch.zeros(16, 2, 80, dtype=torch.bfloat16)
    write_kv(numbers, numbers, *torch.zeros(2, 2, 16, 2, 80).to(dtype), torch.arange(16), 2.0, 3.0)
    assert ("cvt.rn.satfinite.e4m3x2.f32" in launches.ptx()) == (dtype == torch.float8_e4m3fn)
