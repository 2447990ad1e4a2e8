"""Inductor's kernels under dependent launch: none writes before it waits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from workers.gpu.device.compiled_launch import TritonKernel, filter_waits, let_compiled_kernels_start_early

pytestmark = pytest.mark.slow  # the import

WAIT, NEXT = TritonKernel.GDC_WAIT, TritonKernel.GDC_LAUNCH
LOAD, STORE = "tmp0 = tl.load(in_ptr0 + (x0), xmask)", "tl.store(out_ptr0 + (x0), tmp0, xmask)"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ([STORE], [WAIT, STORE]),  # of zeros, say
        (["tl.atomic_add(out_ptr0 + (x0), tmp0, xmask)"], [WAIT, "tl.atomic_add(out_ptr0 + (x0), tmp0, xmask)"]),
        (
            ["for r0_offset in range(0, n):", LOAD, STORE, WAIT, NEXT],
            [WAIT, "for r0_offset in range(0, n):", LOAD, STORE, NEXT],
        ),
        ([LOAD, WAIT, NEXT, LOAD, WAIT, NEXT, STORE], [LOAD, WAIT, LOAD, NEXT, STORE]),  # reads an older tensor early
    ],
    ids=["fill", "atomic", "loop", "older tensor"],
)
def test_a_kernel_waits_before_its_first_write(body: list[str], expected: list[str]) -> None:
    kernel = SimpleNamespace(GDC_WAIT=WAIT, GDC_LAUNCH=NEXT, _enable_pdl_codegen=lambda: True)
    code = SimpleNamespace(_lines=list(body))
    filter_waits(kernel, code)
    assert code._lines == expected


def test_inductor_writes_kernels_in_this_way_and_uses_none_that_it_kept_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonKernel, "_filter_pdl", TritonKernel._filter_pdl)
    monkeypatch.setattr(torch._inductor.config.triton, "enable_pdl", False)
    with torch.compiler.config.patch(cache_key_tag="of this model"):
        let_compiled_kernels_start_early()
        assert TritonKernel._filter_pdl is filter_waits
        assert torch._inductor.config.triton.enable_pdl
        assert torch.compiler.config.cache_key_tag.startswith("of this model; ")
