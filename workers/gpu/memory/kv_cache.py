"""The paged KV cache: one K and one V tensor per layer, cut into blocks that sequences hold in any order.

Owns the tensors and their size. The scheduler decides which sequence holds which block. Each step's `slot_mapping` says
where its tokens go. The last block, which the scheduler does not know, is the trash block: padding is written there and
read from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from ipc.errors import ConfigError
from ipc.records import StepShape
from workers.gpu.config import CacheConfig
from workers.gpu.e4m3 import E4M3, E4M3_MAX

MIB: Final = 1 << 20


@dataclass(frozen=True)
class LayerShape:
    """The shape of one token's K and V in one layer. Value heads may be narrower than key heads."""

    num_kv_heads: int
    head_dim_k: int
    head_dim_v: int

    @property
    def num_elements(self) -> int:
        return self.num_kv_heads * (self.head_dim_k + self.head_dim_v)


@dataclass(frozen=True)
class KVScales:
    """The scales of one layer's K and V in a cache of 8 bits: a stored number times its scale is the model's number.

    Both are positive and finite, and so are their inverses in float32.
    """

    key: float = 1.0
    value: float = 1.0


class KVCache:
    """The cache's tensors. They are allocated once, zeroed so that padding reads finite values, and live as long as
    this object.

    `key[i]` is [num_blocks + 1, block_size, num_kv_heads, head_dim_k] of layer i, `value[i]` the same with head_dim_v.
    `scales[i]` are the layer's; all are 1 if `dtype` is the one that the model computes K and V in.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        scales: Sequence[KVScales] = (),  # of each layer; empty = all 1
    ) -> None:
        def zeros(layer: LayerShape, head_dim: int) -> torch.Tensor:
            return torch.zeros(num_blocks + 1, block_size, layer.num_kv_heads, head_dim, dtype=dtype, device=device)

        self.num_blocks = num_blocks  # without the trash block
        self.block_size = block_size
        self.key = [zeros(layer, layer.head_dim_k) for layer in layers]
        self.value = [zeros(layer, layer.head_dim_v) for layer in layers]
        self.scales = list(scales) or [KVScales()] * len(layers)
        self.num_bytes = sum(tensor.nbytes for tensor in (*self.key, *self.value))
        self._is_quantized = dtype == E4M3
        self._key_slots = [self._slots(key) for key in self.key]
        self._value_slots = [self._slots(value) for value in self.value]

    def write(self, layer_idx: int, slot_mapping: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store K and V of a step's tokens, [T, num_kv_heads, head_dim], at the kv_slots `slot_mapping`, [T] int64.

        Padding tokens write to the same kv_slots of the trash block, in no fixed order, which does no harm. A cache of
        8 bits stores what `quantize` returns.
        """
        scales = self.scales[layer_idx]
        if key.is_cuda:
            from workers.gpu.attention.triton_kv_write import write_kv  # without CUDA there may be no triton

            write_kv(
                key, value, self.key[layer_idx], self.value[layer_idx], slot_mapping, scales.key, scales.value
            )  # fmt: skip
            return
        if self._is_quantized:
            key, value = (
                quantize(*each).view(torch.uint8) for each in ((key, scales.key), (value, scales.value))
            )  # fmt: skip
        self._key_slots[layer_idx].index_copy_(0, slot_mapping, key)
        self._value_slots[layer_idx].index_copy_(0, slot_mapping, value)

    def _slots(self, cache: torch.Tensor) -> torch.Tensor:
        """Return a view, [num_kv_slots, num_kv_heads, head_dim]; as bytes if quantised, for which torch has
        `index_copy_`."""
        slots = cache.flatten(0, 1)
        return slots.view(torch.uint8) if self._is_quantized else slots


def quantize(numbers: torch.Tensor, scale: float) -> torch.Tensor:
    """Divide by `scale` and round to float8_e4m3fn. Returns the same shape.

    Numbers that are too large become the largest that the format has. NaN and infinity become NaN, so that a sequence
    whose K or V is not finite is not finite either.
    """
    scaled = numbers.float() * (1 / scale)
    return (scaled.clamp(-E4M3_MAX, E4M3_MAX) + (numbers - numbers)).to(E4M3)


def choose_num_blocks(
    layers: Sequence[LayerShape],
    config: CacheConfig,
    shape: StepShape,
    dtype: torch.dtype,
    device: torch.device,
    left_bytes: int = 0,
) -> int:
    """Return the cache's number of blocks, without the trash block.

    The cache leaves `left_bytes` of the free memory for later allocations. On the CPU it gets at most enough blocks for
    all rows at full length, because other programs can use the rest. Raises ConfigError if the blocks do not fit the
    device's memory, or do not hold one sequence of `max_model_len`.
    """
    block_bytes = shape.block_size * sum(layer.num_elements for layer in layers) * dtype.itemsize
    free_bytes = max(0, free_memory_bytes(device) - left_bytes)
    if config.num_blocks is not None:
        num_blocks = config.num_blocks
        if (num_blocks + 1) * block_bytes > free_bytes:
            raise ConfigError(
                f"cache.num_blocks ({num_blocks}) blocks of {block_bytes} bytes take {num_blocks * block_bytes // MIB} "
                f"MiB, but {device} has {free_bytes // MIB} MiB for them: at most {free_bytes // block_bytes - 1} fit"
            )
    else:
        num_blocks = int(free_bytes * config.memory_share) // block_bytes - 1
        if device.type == "cpu":
            num_blocks = min(num_blocks, shape.max_num_seqs * shape.max_blocks_per_seq)
    if num_blocks < shape.max_blocks_per_seq:
        source = "cache.num_blocks" if config.num_blocks is not None else f"cache.memory_share ({config.memory_share})"
        raise ConfigError(
            f"{source} gives {max(num_blocks, 0)} blocks of {shape.block_size} tokens ({block_bytes} bytes each), but "
            f"one sequence of scheduler.max_model_len ({shape.max_model_len}) tokens takes {shape.max_blocks_per_seq}: "
            f"give the cache more, or lower scheduler.max_model_len"
        )
    return num_blocks


def free_memory_bytes(device: torch.device) -> int:
    """Bytes of `device`'s memory that no process uses; on the CPU, the machine's available memory."""
    if device.type == "cpu":
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        raise ConfigError("/proc/meminfo has no MemAvailable, so the cache's size is not known: set cache.num_blocks")
    free_bytes, _ = torch.get_device_module(device).mem_get_info(device)
    return int(free_bytes)
