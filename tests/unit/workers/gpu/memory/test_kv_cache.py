"""The paged KV cache: where K and V are written, and the number of blocks."""

from __future__ import annotations

import pytest
import torch

from ipc.errors import ConfigError
from ipc.records import StepShape
from workers.gpu.config import CacheConfig
from workers.gpu.e4m3 import E4M3
from workers.gpu.memory import kv_cache
from workers.gpu.memory.kv_cache import KVCache, KVScales, LayerShape, choose_num_blocks, quantize

CPU = torch.device("cpu")
SHAPE = StepShape(max_num_seqs=3, max_num_batched_tokens=32, max_model_len=50, block_size=8)  # 7 blocks a sequence
LAYERS = [LayerShape(num_kv_heads=2, head_dim_k=16, head_dim_v=8), LayerShape(4, 4, 4)]
BLOCK_BYTES = 8 * (2 * 24 + 4 * 8) * 4


def choose(config: CacheConfig, dtype: torch.dtype = torch.float32) -> int:
    return choose_num_blocks(LAYERS, config, SHAPE, dtype, CPU)


def test_each_layer_stores_its_own_sizes_at_the_kv_slots_of_the_step() -> None:
    cache = KVCache(LAYERS, num_blocks=5, block_size=8, dtype=torch.float32, device=CPU)
    assert [tuple(key.shape) for key in cache.key] == [(6, 8, 2, 16), (6, 8, 4, 4)]
    assert [tuple(value.shape) for value in cache.value] == [(6, 8, 2, 8), (6, 8, 4, 4)]
    key = torch.randn(2, 3, 16).transpose(0, 1)  # [T, heads, head_dim] in a model's strides
    value = torch.randn(2, 3, 8).transpose(0, 1)
    cache.write(0, torch.tensor([8 * 2 + 7, 8 * 4, 8 * 5]), key, value)
    assert torch.equal(cache.key[0][2, 7], key[0])
    assert torch.equal(cache.value[0][4, 0], value[1])
    assert int(cache.key[0].count_nonzero()) == key.numel(), "more than the step's own kv_slots was written"
    assert not cache.key[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cache_of_8_bits_holds_the_numbers_divided_by_each_layers_scales(dtype: torch.dtype) -> None:
    cache = KVCache(LAYERS, 5, 8, E4M3, CPU, scales=[KVScales(), KVScales(key=0.25, value=3.0)])
    assert cache.num_bytes == 6 * BLOCK_BYTES // 4
    key, value = torch.randn(2, 4, 4).to(dtype), torch.randn(2, 4, 4).to(dtype)
    cache.write(1, torch.tensor([3, 8 * 4]), key, value)
    stored = cache.key[1].flatten(0, 1)[[3, 32]].float(), cache.value[1].flatten(0, 1)[[3, 32]].float()
    torch.testing.assert_close(stored[0] * 0.25, key.float(), rtol=2**-4, atol=2**-10)
    torch.testing.assert_close(stored[1] * 3.0, value.float(), rtol=2**-4, atol=3 * 2**-10)
    assert not cache.key[0].view(torch.uint8).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_numbers_saturate_in_8_bits_and_what_is_not_finite_is_nan(dtype: torch.dtype) -> None:
    numbers = torch.tensor([0.0, 1.0, 448.0, 470.0, 60_000.0, -60_000.0, torch.nan, torch.inf, -torch.inf], dtype=dtype)
    assert quantize(numbers, 1.0)[:6].float().tolist() == [0.0, 1.0, 448.0, 448.0, 448.0, -448.0]
    assert quantize(numbers, 1e-38)[1:6].float().tolist() == [448.0, 448.0, 448.0, 448.0, -448.0]
    assert quantize(numbers, 1e3)[4:6].float().tolist() == [60.0, -60.0]
    assert quantize(numbers, 1.0)[6:].isnan().all()


def test_on_the_cpu_no_more_blocks_than_all_rows_can_fill() -> None:
    assert choose(CacheConfig(block_size=8)) == 3 * 7


def test_blocks_take_the_share_of_free_memory_that_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "free_memory_bytes", lambda device: 20 * BLOCK_BYTES)
    assert choose(CacheConfig(block_size=8, memory_share=0.5)) == 9, "the trash block counts too"
    assert choose(CacheConfig(block_size=8, memory_share=0.5), E4M3) == 21, "at most what all rows can fill"
    monkeypatch.setattr(kv_cache, "free_memory_bytes", lambda device: 4 * BLOCK_BYTES)
    assert choose(CacheConfig(block_size=8, memory_share=1.0), E4M3) == 15, "four times as many as of float32"


def test_too_few_blocks_for_one_sequence_are_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"cache\.num_blocks gives 6 blocks of 8 tokens .* \(50\) tokens takes 7"):
        choose(CacheConfig(block_size=8, num_blocks=6))
    assert choose(CacheConfig(block_size=8, num_blocks=7)) == 7
    monkeypatch.setattr(kv_cache, "free_memory_bytes", lambda device: 10 * BLOCK_BYTES)
    with pytest.raises(ConfigError, match=r"cache\.memory_share \(0\.5\) gives 4 blocks"):
        choose(CacheConfig(block_size=8, memory_share=0.5))


def test_more_blocks_than_memory_holds_are_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "free_memory_bytes", lambda device: 20 * BLOCK_BYTES)
    with pytest.raises(ConfigError, match=r"cache\.num_blocks \(20\) .* at most 19 fit"):
        choose(CacheConfig(block_size=8, num_blocks=20))
    assert choose(CacheConfig(block_size=8, num_blocks=19)) == 19
