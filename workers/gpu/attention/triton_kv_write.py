"""Writes the K and V of a step's tokens into the paged cache."""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from workers.gpu.device.dependent_launch import is_dependent_launch_possible, launch_options
from workers.gpu.e4m3 import E4M3, E4M3_MAX

_LARGEST = tl.constexpr(E4M3_MAX)


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """Store `key` and `value`, [T, num_kv_heads, head_dim] of any strides, at the kv_slots `slot_mapping`, [T] int64.

    The caches are one layer's, contiguous, [num_blocks + 1, block_size, num_kv_heads, head_dim]. Padding tokens write
    to the same kv_slots of the trash block, in no fixed order, which does no harm.

    Caches of float8_e4m3fn store the numbers divided by their scale. Too large ones become the largest that the format
    has; NaN and infinity become NaN. For other caches the scales are 1.
    """
    num_tokens, num_heads, dim_k = key.shape
    dim_v = value.shape[-1]
    for cache in (key_cache, value_cache):
        assert cache.is_contiguous(), "a kv_slot is an offset into a contiguous cache"
    dependent_launch = is_dependent_launch_possible(key.device)
    _write_kv[(num_tokens,)](
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        *key.stride(),
        *value.stride(),
        1 / key_scale,
        1 / value_scale,
        NUM_HEADS=num_heads,
        DIM_K=dim_k,
        DIM_V=dim_v,
        BLOCK_HEADS=triton.next_power_of_2(num_heads),
        BLOCK_DIM_K=triton.next_power_of_2(dim_k),
        BLOCK_DIM_V=triton.next_power_of_2(dim_v),
        QUANTIZE=key_cache.dtype == E4M3,
        DEPENDENT_LAUNCH=dependent_launch,
        num_warps=4,
        **launch_options(dependent=dependent_launch),
    )


@triton.jit
def _write_kv(
    key: tl.tensor,
    value: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    slot_mapping: tl.tensor,
    key_token_stride: tl.tensor,
    key_head_stride: tl.tensor,
    key_dim_stride: tl.tensor,
    value_token_stride: tl.tensor,
    value_head_stride: tl.tensor,
    value_dim_stride: tl.tensor,
    key_factor: tl.tensor,
    value_factor: tl.tensor,
    NUM_HEADS: tl.constexpr,
    DIM_K: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM_K: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
    QUANTIZE: tl.constexpr,
    DEPENDENT_LAUNCH: tl.constexpr,
) -> None:
    if DEPENDENT_LAUNCH:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    kv_slot = tl.load(slot_mapping + token)
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    dim_k = tl.arange(0, BLOCK_DIM_K)[None, :]
    dim_v = tl.arange(0, BLOCK_DIM_V)[None, :]
    is_key = (head < NUM_HEADS) & (dim_k < DIM_K)
    is_value = (head < NUM_HEADS) & (dim_v < DIM_V)
    key_from = key + token * key_token_stride + head * key_head_stride + dim_k * key_dim_stride
    value_from = value + token * value_token_stride + head * value_head_stride + dim_v * value_dim_stride
    key_rows = tl.load(key_from, mask=is_key)
    value_rows = tl.load(value_from, mask=is_value)
    if QUANTIZE:
        key_rows = _quantize(key_rows, key_factor)
        value_rows = _quantize(value_rows, value_factor)
    tl.store(key_cache + (kv_slot * NUM_HEADS + head) * DIM_K + dim_k, key_rows, mask=is_key)
    tl.store(value_cache + (kv_slot * NUM_HEADS + head) * DIM_V + dim_v, value_rows, mask=is_value)


@triton.jit
def _quantize(numbers: tl.tensor, factor: tl.tensor) -> tl.tensor:
    """See `quantize` of the KV cache. The GPU's minimum and maximum lose NaN; the difference restores it."""
    numbers = numbers.to(tl.float32)
    scaled = tl.minimum(tl.maximum(numbers * factor, -_LARGEST), _LARGEST)
    return (scaled + (numbers - numbers)).to(tl.float8e4nv)
