"""The rule of dependent launch, in the kernels as they are compiled for a GPU on a machine without one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.reference.paged_attention import make_paged_step, run_backend

pytest.importorskip("triton")

from tests.unit.workers.gpu.attention.test_triton_compiled import Launches
from workers.gpu.attention import triton_backend, triton_kv_write
from workers.gpu.attention.triton_backend import Tuning
from workers.gpu.products import few_rows, triton_rows
from workers.gpu.products.fp8 import to_fp8
from workers.gpu.products.plan import Plan

pytestmark = pytest.mark.slow

WAIT, START_NEXT = "griddepcontrol.wait", "griddepcontrol.launch_dependents"
ACCESS = re.compile(r"\b(ld|st|atom|red|cp\.async)\b[\w.:]*\.global")


def attend(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = torch.zeros(8, 8, dtype=torch.int32)
    monkeypatch.setattr(triton_backend, "plan_decodes", lambda *_, **__: (plan, plan))
    step = make_paged_step([(1, 30)] * 4, head_dim=64, block_size=16, dtype=torch.bfloat16)
    run_backend(triton_backend.TritonBackend(Tuning(positions=64, warps=4, stages=2)), step, scaling=0.1)


def write(_: pytest.MonkeyPatch) -> None:
    numbers = torch.zeros(16, 2, 64, dtype=torch.bfloat16)
    triton_kv_write.write_kv(numbers, numbers, *torch.zeros(2, 2, 16, 2, 64).bfloat16(), torch.arange(16))


def gate(_: pytest.MonkeyPatch) -> None:
    triton_rows.gate(torch.zeros(4, 128).bfloat16(), torch.zeros(4, 64).bfloat16(), dependent_launch=True)


def multiply(plan: Plan, num_rows: int, *, is_gated: bool, is_fp8: bool = True) -> Callable[[pytest.MonkeyPatch], None]:
    def launch(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(few_rows, "converts_fp8", lambda _: True)
        x, weight, bias = torch.zeros(num_rows, 512).bfloat16(), torch.zeros(256, 512).bfloat16(), torch.zeros(256)
        weight, scale = to_fp8(weight) if is_fp8 else (weight, None)
        out = torch.zeros(num_rows, 128 if is_gated else 256).bfloat16()
        residual, scratch = None if is_gated else out.clone(), few_rows.Scratch(x.device)
        few_rows.multiply_few_rows(
            plan, x, weight, scale, bias.bfloat16(), residual, out,
            scratch, is_gated=is_gated, dependent_launch=True,
        )  # fmt: skip

    return launch


@pytest.mark.parametrize(
    ("module", "kernel", "launch"),
    [
        (triton_backend, "decode", attend),
        (triton_backend, "combine", attend),
        (triton_kv_write, "_write_kv", write),
        (triton_rows, "_gate", gate),
        (few_rows, "_vector", multiply(Plan("vector", 4, 512, 4, 1), 2, is_gated=True, is_fp8=False)),
        (few_rows, "_vector", multiply(Plan("vector", 4, 128, 4, 4), 1, is_gated=False, is_fp8=False)),
        (few_rows, "_words", multiply(Plan("words", 4, 512, 4, 4), 2, is_gated=True)),
        (few_rows, "_matrix", multiply(Plan("matrix", 64, 64, 4, 3, split=2), 16, is_gated=True)),
        (few_rows, "_matrix", multiply(Plan("matrix", 64, 64, 4, 3), 16, is_gated=False)),
    ],
    ids=[
        "decode",
        "combine",
        "KV",
        "gate",
        "vector, gated",
        "vector",
        "fp8 vector",
        "matrix, gated and split",
        "matrix",
    ],
)
def test_a_kernel_waits_before_it_touches_what_others_write_and_lets_the_next_one_start_after_that(
    module: ModuleType,
    kernel: str,
    launch: Callable[[pytest.MonkeyPatch], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for each in (triton_backend, triton_kv_write):
        monkeypatch.setattr(each, "is_dependent_launch_possible", lambda _: True)
    launched = ("decode", "combine") if launch is attend else (kernel,)
    kernels = {name: Launches(getattr(module, name)) for name in launched}
    for name, launches in kernels.items():
        monkeypatch.setattr(module, name, launches)
    launch(monkeypatch)
    before, wait, after = kernels[kernel].ptx().partition(WAIT)
    assert wait
    assert START_NEXT not in before
    assert START_NEXT in after
    early = {match[1] for match in ACCESS.finditer(before)}
    assert early <= ({"ld"} if kernel == "_vector" else set()), "only weights are read so early"
    assert {"ld", "st"} <= {match[1] for match in ACCESS.finditer(after)}
