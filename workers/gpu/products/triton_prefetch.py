"""Lets the L2 cache read weights that a kernel will need, while the kernel in front of it still runs."""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def prefetch_rows(row_at: tl.tensor, num_columns: tl.tensor, LINES: tl.constexpr) -> None:
    """Ask for the first LINES lines of 128 bytes of the rows at `row_at` [N, 1], pointers to `num_columns` numbers
    each. Rows have a line at least. LINES is a power of 2; lines beyond a row's end stand for its last one."""
    IN_LINE: tl.constexpr = 1024 // row_at.dtype.element_ty.primitive_bitwidth
    column = tl.minimum(tl.arange(0, LINES) * IN_LINE, num_columns - IN_LINE)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [row_at + column[None, :]], dtype=tl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip
