"""Attention over the paged cache by Triton kernels: the backend for CUDA. Tests run it interpreted on a CPU.

The host reads no lengths, and every grid depends only on the bucket's sizes. So a graph can capture a step,
`begin_step` included, and replay it for any batch of its bucket.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import torch
import triton

from workers.gpu.attention.triton_decode import combine, decode
from workers.gpu.attention.triton_plan import plan_decodes, plan_tiles
from workers.gpu.attention.triton_prefill import prefill
from workers.gpu.device.dependent_launch import is_dependent_launch_possible, launch_options
from workers.gpu.execution.step_batch import StepBatch
from workers.gpu.model.probed_model import ProbedModel

_LOG2_E: Final = math.log2(math.e)
_SMALLEST_PRODUCT: Final = 16  # rows, of the matrix units
_NO_DEVICE_PARTS: Final = 5  # under the interpreter: few parts, so that parts cut sequences and sequences share parts


@dataclass(frozen=True)
class Tuning:
    """A kernel's tile sizes and pipelining on this device. It reads `positions` of KV at a time, with `stages` such
    reads under way."""

    positions: int
    warps: int
    stages: int
    rows: int = 0  # of queries in a product: for prefill
    programs: int = 0  # that share a multiprocessor: for decode


# Of decodes: the most bytes of one KV head's K at one position in the cache, and the tile sizes up to there. `programs`
# of them fit a multiprocessor's registers and shared memory.
_DECODE_TUNINGS: Final = (
    (128, Tuning(positions=64, warps=2, stages=3, programs=6)),
    (256, Tuning(positions=64, warps=4, stages=2, programs=4)),
)
_NARROW_DECODE_TUNINGS: Final = (  # of a cache of 8 bits
    (64, Tuning(positions=128, warps=4, stages=3, programs=4)),
    (128, Tuning(positions=128, warps=4, stages=3, programs=3)),
)


class TritonBackend:
    """See `AttentionBackend`. `decode_tuning` and `prefill_tuning` override the choice that is made by head size and
    device."""

    needs_host_lengths = False

    def __init__(self, decode_tuning: Tuning | None = None, prefill_tuning: Tuning | None = None) -> None:
        self._decode_tuning = decode_tuning
        self._prefill_tuning = prefill_tuning

    def check(self, facts: ProbedModel) -> None:
        """Accept every model: this backend supports all features."""

    def begin_step(self, batch: StepBatch) -> TritonStep:
        return TritonStep(batch, self._decode_tuning, self._prefill_tuning)


class TritonStep:
    """See `StepAttention`. The first layer that needs a plan makes it; the other layers use it again."""

    def __init__(self, batch: StepBatch, decode_tuning: Tuning | None, prefill_tuning: Tuning | None) -> None:
        self._batch = batch
        self._decode_tuning = decode_tuning
        self._prefill_tuning = prefill_tuning
        self._decode_plans: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._tile_plans: dict[int, torch.Tensor] = {}
        self._shares: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def __call__(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
        value_scale: float = 1.0,
    ) -> torch.Tensor:
        if query.stride(-1) != 1:
            query = query.contiguous()
        num_tokens, num_heads, dim_k = query.shape
        _, block_size, num_kv_heads, dim_v = value_cache.shape
        result = query.new_empty(num_tokens, num_heads, dim_v)
        call = _Call(
            result,
            query,
            key_cache,
            value_cache,
            # Without sinks the kernel still needs a pointer; it never reads this one.
            query if sinks is None else sinks,
            window=sliding_window or 0,
            scales=(scaling, _LOG2_E * scaling) if softcap is None else (scaling / softcap, _LOG2_E * softcap),
            value_scale=None if value_scale == 1.0 else value_scale,
            meta={
                "NUM_KV_HEADS": num_kv_heads,
                "GROUP": num_heads // num_kv_heads,
                "BLOCK_SIZE": block_size,
                "DIM_K": dim_k,
                "DIM_V": dim_v,
                "BLOCK_DIM_K": max(triton.next_power_of_2(dim_k), _SMALLEST_PRODUCT),
                "BLOCK_DIM_V": max(triton.next_power_of_2(dim_v), _SMALLEST_PRODUCT),
                "SOFTCAP": softcap is not None,
                "SINKS": sinks is not None,
                # float32 products stay in float32: tf32 on the matrix units would round them.
                "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
            },
        )
        self._decode(call)
        if num_tokens > self._batch.num_seqs:
            self._prefill(call)
        return result

    def _decode(self, call: _Call) -> None:
        tuning = self._decode_tuning or choose_decode_tuning(*call.tuned_for)
        num_kv_heads, group = int(call.meta["NUM_KV_HEADS"]), int(call.meta["GROUP"])
        num_parts = choose_num_parts(call.query.device, tuning, num_kv_heads)
        key = (num_parts, call.window, tuning.positions)
        if key not in self._decode_plans:
            self._decode_plans[key] = plan_decodes(
                self._batch, window=call.window, unit=tuning.positions, num_parts=num_parts
            )
        entries, parts = self._decode_plans[key]
        dim_v = int(call.meta["DIM_V"])
        num_programs = num_parts * num_kv_heads
        dependent_launch = is_dependent_launch_possible(call.query.device)
        launch = launch_options(dependent=dependent_launch)
        shape = (num_programs, group, dim_v)
        if shape not in self._shares:
            sums = torch.empty(2, num_programs, 2, group, dtype=torch.float32, device=call.query.device)
            weighted = torch.empty(num_programs, 2, group, dim_v, dtype=torch.float32, device=call.query.device)
            self._shares[shape] = (weighted, sums[0], sums[1])
        shares = self._shares[shape]
        decode[(num_programs,)](
            call.result,
            *shares,
            call.query,
            call.key_cache,
            call.value_cache,
            entries,
            parts,
            self._batch.cu_seqlens,
            self._batch.block_table,
            call.sinks,
            self._batch.num_seqs,
            self._batch.num_tokens,
            *call.strides(self._batch.block_table),
            *call.scales,
            call.value_scale,
            BLOCK_GROUP=max(triton.next_power_of_2(group), _SMALLEST_PRODUCT),
            UNIT=tuning.positions,
            PAIRED=call.has_pairs,
            DEPENDENT_LAUNCH=dependent_launch,
            num_warps=tuning.warps,
            num_stages=tuning.stages,
            **launch,
            **call.meta,
        )
        by_entry = len(entries) < num_parts
        combine[(len(entries) if by_entry else num_parts - 1, num_kv_heads * group)](
            call.result,
            *shares,
            entries,
            parts,
            call.sinks,
            call.value_scale,
            BY_ENTRY=by_entry,
            NUM_KV_HEADS=num_kv_heads,
            GROUP=group,
            NUM_SHARES=_SMALLEST_PRODUCT,
            DIM_V=dim_v,
            BLOCK_DIM_V=call.meta["BLOCK_DIM_V"],
            SINKS=call.meta["SINKS"],
            DEPENDENT_LAUNCH=dependent_launch,
            num_warps=4,
            **launch,
        )

    def _prefill(self, call: _Call) -> None:
        tuning = self._prefill_tuning or choose_prefill_tuning(*call.tuned_for)
        group = int(call.meta["GROUP"])
        rows = max(tuning.rows, triton.next_power_of_2(group))
        block_q = rows // group
        if block_q not in self._tile_plans:
            self._tile_plans[block_q] = plan_tiles(self._batch, block_q)
        tiles = self._tile_plans[block_q]
        prefill[(tiles.shape[0] * int(call.meta["NUM_KV_HEADS"]),)](
            call.result,
            call.query,
            call.key_cache,
            call.value_cache,
            tiles,
            self._batch.block_table,
            call.sinks,
            *call.strides(self._batch.block_table),
            *call.scales,
            call.value_scale,
            BLOCK_M=rows,
            BLOCK_N=tuning.positions,
            WINDOW=call.window,
            num_warps=tuning.warps,
            num_stages=tuning.stages,
            **call.meta,
        )


@dataclass(frozen=True)
class _Call:
    """One layer's tensors, and the compile-time constants of both kernels."""

    result: torch.Tensor
    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    sinks: torch.Tensor
    window: int  # 0 = none
    scales: tuple[float, float]  # scale of the scores before and after the soft cap
    value_scale: float | None  # None = 1: the kernels are then compiled without it
    meta: dict[str, int | bool | str]

    @property
    def has_pairs(self) -> bool:
        """Whether the decode kernel reads V as pairs of 8 bits: if half of its padded heads still make a product."""
        is_even = int(self.meta["DIM_V"]) % 2 == 0 and int(self.meta["BLOCK_DIM_V"]) >= 2 * _SMALLEST_PRODUCT
        return is_even and self.value_cache.dtype.itemsize == 1

    @property
    def tuned_for(self) -> tuple[torch.device, int, torch.dtype, torch.dtype]:
        """What the tile sizes depend on. The head size is that of K or V, the larger, padded as the kernels hold it."""
        head_dim = max(int(self.meta["BLOCK_DIM_K"]), int(self.meta["BLOCK_DIM_V"]))
        return self.query.device, head_dim, self.key_cache.dtype, self.query.dtype

    def strides(self, block_table: torch.Tensor) -> tuple[int, ...]:
        return (
            *self.query.stride()[:2],
            *self.key_cache.stride()[:3],
            *self.value_cache.stride()[:3],
            block_table.stride(0),
        )


def choose_num_parts(device: torch.device, tuning: Tuning, num_kv_heads: int) -> int:
    """The number of parts of a step's decodes. At least 2, so that the grid of the combining kernel is not empty."""
    if device.type != "cuda":
        return _NO_DEVICE_PARTS
    num_programs = torch.cuda.get_device_properties(device).multi_processor_count * tuning.programs
    return max(2, num_programs // num_kv_heads)


def choose_decode_tuning(device: torch.device, head_dim: int, cache_dtype: torch.dtype, dtype: torch.dtype) -> Tuning:
    """Choose tile sizes for padded heads of `head_dim` elements in the cache, and queries of `dtype`.

    The values for 16 bits are the fastest of about forty that were measured on an H200, for 128 and 256 bytes. Those
    for 8 bits are not measured. They follow from the compiled code: a tile of twice as many positions has as many
    bytes, and half the instructions per byte of one of 64.
    """
    if device.type != "cuda":
        return Tuning(positions=16, warps=4, stages=1)
    is_narrow = cache_dtype.itemsize == 1 and dtype.itemsize == 2  # in float32, what is read is wide at once
    key_bytes = head_dim * (1 if is_narrow else dtype.itemsize)
    for most_bytes, tuning in _NARROW_DECODE_TUNINGS if is_narrow else _DECODE_TUNINGS:
        if key_bytes <= most_bytes:
            return tuning
    positions = 64 if is_narrow else 32
    return Tuning(positions, warps=4, stages=_stages(device, 2 * key_bytes * positions, at_most=3), programs=2)


def choose_prefill_tuning(device: torch.device, head_dim: int, cache_dtype: torch.dtype, dtype: torch.dtype) -> Tuning:
    """Choose tile sizes, for the same arguments."""
    if device.type != "cuda":
        return Tuning(positions=16, warps=4, stages=1, rows=16)
    if dtype == torch.float32:  # small products in registers, not on the matrix units
        return Tuning(positions=32, warps=8, stages=1, rows=32)
    row_bytes = head_dim * dtype.itemsize  # of a product
    rows, positions = 128, 64 if row_bytes <= 256 else 32
    held_bytes = rows * row_bytes
    if cache_dtype != dtype:
        held_bytes += 2 * positions * row_bytes  # K and V after their conversion
    stage_bytes = 2 * head_dim * cache_dtype.itemsize * positions
    return Tuning(positions, warps=8, stages=_stages(device, stage_bytes, at_most=3, besides=held_bytes), rows=rows)


def _stages(device: torch.device, stage_bytes: int, *, at_most: int, besides: int = 0) -> int:
    """Return how many reads of `stage_bytes` fit a multiprocessor's shared memory at once."""
    properties: Any = torch.cuda.get_device_properties(device)  # its stub lacks this attribute
    return max(1, min(at_most, (int(properties.shared_memory_per_block_optin) - besides) // stage_bytes))
