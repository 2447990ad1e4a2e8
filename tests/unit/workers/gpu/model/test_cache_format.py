"""A KV cache of 8 bits: its scales in a model's files, and the logits of models that use it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ipc.errors import ConfigError, ModelUnsupported
from ipc.records import StepShape
from tests.reference.narrow_cache import NUM_NEW, check_logits, make_scaled_model
from tests.reference.packed_steps import run_packed
from workers.gpu.config import CacheConfig, ModelConfig
from workers.gpu.memory.kv_cache import KVScales
from workers.gpu.model.cache_format import check_cache_dtype, read_cache_scales
from workers.gpu.model.loader import LoadedModel, load_model

SHAPE = StepShape(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64, block_size=4)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def load(folder: Path, cache: CacheConfig) -> LoadedModel:
    config = ModelConfig(path=str(folder), device="cpu", num_threads=1)
    return load_model(config, cache, SHAPE, torch.device("cpu"), lambda *_: None)


def write(folder: Path, **scales: torch.Tensor | float) -> list[Path]:
    """A file of weights with such tensors in layers; "__" stands for a dot."""
    file = folder / "model.safetensors"
    tensors = {f"model.layers.{name.replace('__', '.')}": torch.as_tensor(each) for name, each in scales.items()}
    save_file(tensors, file, {"format": "pt"})
    return [file]


def test_scales_are_read_under_the_names_of_each_tool(tmp_path: Path) -> None:
    files = write(
        tmp_path,
        **{
            "0__self_attn__k_scale": 0.5,
            "0__self_attn__v_scale": torch.tensor([0.25]),
            "1__self_attn__k_proj__output_scale": torch.tensor(3.0, dtype=torch.bfloat16),
            "1__self_attn__v_proj__v_scale": 2.0,
            "10__self_attn__attn__k_scale": 7.0,
            "0__self_attn__k_proj__weight_scale": -1.0,
            "11__self_attn__v_scale": -1.0,  # of a layer for multi-token prediction
        },
    )
    scales = read_cache_scales("m", files, num_layers=11)
    assert scales == [KVScales(0.5, 0.25), KVScales(3.0, 2.0), *[KVScales()] * 8, KVScales(key=7.0)]
    assert read_cache_scales("m", [], num_layers=2) == [KVScales(), KVScales()]


@pytest.mark.parametrize(
    ("scale", "reason"),
    [
        (0.0, "is 0, and a scale has to be finite and at least 1.2e-38: "),
        (-0.5, r"is -0\.5, and"),
        (torch.nan, "is nan, and"),
        (torch.inf, "is inf, and"),
        (1e-40, r"is 9\.99995e-41, and"),
        (torch.ones(2), r'has 2 numbers, and cache\.dtype "fp8_e4m3" takes one for each layer: set cache\.dtype'),
    ],
)
def test_a_scale_that_cannot_be_one_is_refused_by_name(
    scale: torch.Tensor | float, reason: str, tmp_path: Path
) -> None:
    files = write(tmp_path, **{"1__self_attn__v_scale": scale})
    with pytest.raises(ModelUnsupported, match=rf"scale model\.layers\.1\.self_attn\.v_scale {reason}"):
        read_cache_scales("m", files, num_layers=2)


def test_two_scales_of_the_same_layer_are_refused_unless_they_are_equal(tmp_path: Path) -> None:
    first, second = "0__self_attn__k_scale", "0__self_attn__k_proj__output_scale"
    assert read_cache_scales("m", write(tmp_path, **{first: 0.5, second: 0.5}), num_layers=1) == [KVScales(key=0.5)]
    with pytest.raises(ModelUnsupported, match=r"two scales .*k_proj\.output_scale \(2\) and .*k_scale \(0\.5\)"):
        read_cache_scales("m", write(tmp_path, **{first: 0.5, second: 2.0}), num_layers=1)


def test_a_gpu_that_cannot_convert_8_bits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config, device = CacheConfig(dtype="fp8_e4m3"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    with pytest.raises(ConfigError, match=r"needs a GPU of compute capability 8\.9, and this one has 8\.6: set"):
        check_cache_dtype(config, device)
    check_cache_dtype(CacheConfig(), device)
    check_cache_dtype(config, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    check_cache_dtype(config, device)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_logits_are_those_of_transformers_with_k_and_v_rounded_to_8_bits(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_scaled_model(family, tmp_path)
    loaded = load(folder, CacheConfig(dtype="fp8_e4m3", num_blocks=64))
    assert 4 * loaded.memory.kv_blocks == load(folder, CacheConfig(num_blocks=64)).memory.kv_blocks
    check_logits(
        folder, lambda prompts: run_packed(loaded.runner, prompts, NUM_NEW, num_blocks=64, seed=3), monkeypatch
    )  # fmt: skip
