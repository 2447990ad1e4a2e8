"""The greedy sampler's argmax on CUDA: rows are cut into parts, so that few sequences keep the whole device busy."""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

_PART: Final = 4096  # elements of a row that one program reads


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """The index of each row's largest element, the first of equals: [S] int64 for `logits` [S, vocab_size].

    `logits` are bfloat16, float16 or float32. A NaN counts as -inf: what comes back always lies in the row. Looks at
    nothing on the host, so that it can be captured.
    """
    num_rows, row_length = logits.shape
    assert logits.stride(1) == 1, "the elements of a row lie side by side"
    num_parts = triton.cdiv(row_length, _PART)
    values = torch.empty(num_rows, num_parts, dtype=torch.float32, device=logits.device)
    indices = torch.empty(num_rows, num_parts, dtype=torch.int32, device=logits.device)
    result = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    _argmax_of_parts[(num_rows, num_parts)](
        values, indices, logits, logits.stride(0), row_length, PART=_PART, num_warps=4
    )
    _argmax_of_rows[(num_rows,)](
        result, values, indices, num_parts, BLOCK=triton.next_power_of_2(num_parts), num_warps=1
    )
    return result


@triton.jit
def _argmax_of_parts(
    values: tl.tensor,
    indices: tl.tensor,
    logits: tl.tensor,
    row_stride: tl.tensor,
    row_length: tl.tensor,
    PART: tl.constexpr,
) -> None:
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offset = part * PART + tl.arange(0, PART)
    x = tl.load(logits + row * row_stride + offset, mask=offset < row_length, other=-float("inf")).to(tl.float32)
    x = tl.where(x == x, x, -float("inf"))
    # What lies beyond the row is the last of equals, and never chosen.
    value, index = tl.max(x, axis=0, return_indices=True, return_indices_tie_break_left=True)
    place = row * tl.num_programs(1) + part
    tl.store(values + place, value)
    tl.store(indices + place, part * PART + index)


@triton.jit
def _argmax_of_rows(
    result: tl.tensor, values: tl.tensor, indices: tl.tensor, num_parts: tl.tensor, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0)
    part = tl.arange(0, BLOCK)
    x = tl.load(values + row * num_parts + part, mask=part < num_parts, other=-float("inf"))
    _, best = tl.max(x, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(result + row, tl.load(indices + row * num_parts + best).to(tl.int64))
