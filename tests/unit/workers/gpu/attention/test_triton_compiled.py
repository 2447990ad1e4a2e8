"""The attention kernels, compiled for a GPU on a machine without one.

The interpreter runs what a compiler refuses, and does not show what a conversion costs.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.reference.paged_attention import make_paged_step, run_backend

pytest.importorskip("triton")

from tests.reference.compiled_kernels import Launches, waits_before_it_lets_others_start
from workers.gpu.attention import triton_backend
from workers.gpu.attention.triton_backend import Tuning
from workers.gpu.attention.triton_kv_write import _write_kv, write_kv

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("scales", [None, (0.02, 3.0)], ids=["16 bits", "8 bits"])
def test_attention_compiles_for_a_gpu_and_converts_8_bits_in_few_instructions(
    scales: tuple[float, float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = {name: Launches(getattr(triton_backend, name)) for name in ("decode", "combine", "prefill")}
    for name, launches in kernels.items():
        monkeypatch.setattr(triton_backend, name, launches)
    monkeypatch.setattr(triton_backend, "is_dependent_launch_possible", lambda _: True)
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
    assert all(waits_before_it_lets_others_start(ptx[name]) for name in ("decode", "combine"))
    for name in ("decode", "prefill"):
        assert ("cvt.rn.f16x2.e4m3x2" in ptx[name]) == (scales is not None)
        assert "cvt.rn.bf16.f16" not in ptx[name], "slow: this conversion runs in another unit"
    assert not re.search(r"ld\.shared\.[bu]8", ptx["decode"]), "a thread reads V byte by byte"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_the_write_of_kv_compiles_for_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches(_write_kv)
    monkeypatch.setattr("workers.gpu.attention.triton_kv_write.is_dependent_launch_possible", lambda _: True)
    monkeypatch.setattr("workers.gpu.attention.triton_kv_write._write_kv", launches)
    numbers = torch.zeros(16, 2, 80, dtype=torch.bfloat16)
    write_kv(numbers, numbers, *torch.zeros(2, 2, 16, 2, 80).to(dtype), torch.arange(16), 2.0, 3.0)
    assert waits_before_it_lets_others_start(launches.ptx())
    assert ("cvt.rn.satfinite.e4m3x2.f32" in launches.ptx()) == (dtype == torch.float8_e4m3fn)
