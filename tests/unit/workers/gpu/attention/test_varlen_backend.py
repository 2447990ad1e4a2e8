"""The varlen backend's arguments to torch's FlashAttention, held to the torch backend; and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Literal

import pytest
import torch

from ipc.errors import ConfigError
from ipc.records import StepShape
from tests.reference import varlen_attention
from tests.reference.paged_attention import PagedStep, make_paged_step, run_backend
from tests.reference.tiny_models import make_tiny_config
from workers.gpu.attention.backend import AttentionBackend, make_backend
from workers.gpu.config import CacheConfig, ModelConfig
from workers.gpu.memory.kv_cache import LayerShape
from workers.gpu.model.loader import load_model
from workers.gpu.model.probed_model import ProbedModel

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FACTS = ProbedModel(
    layers=[LayerShape(2, 16, 16), LayerShape(2, 64, 64)],
    cache_dtype=torch.bfloat16,
    vocab_size=99,
    logits_dtype=torch.bfloat16,
    has_softcap=False,
    has_sinks=False,
)


@pytest.fixture(autouse=True)
def _fitting_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretends a torch and a GPU that support it. The attention itself is plain torch on the CPU."""
    torch.set_num_threads(1)
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn_out", varlen_attention.varlen_attn_out, raising=False)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.13.0"))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))


def run(backend: AttentionBackend, step: PagedStep, window: int | None) -> torch.Tensor:
    return run_backend(backend, step, scaling=0.3, sliding_window=window)


def zero_outside_of_sequences(step: PagedStep) -> PagedStep:
    """The torch backend gathers whole blocks, so their contents must be finite."""
    return replace(step, key_cache=step.key_cache.nan_to_num(0), value_cache=step.value_cache.nan_to_num(0))


def random_lengths(random: Random) -> list[tuple[int, int]]:
    """Decodes between chunks of prompts, first and later ones."""
    lengths = []
    for _ in range(random.randint(1, 6)):
        computed, num_tokens = random.randint(0, 40), random.choice((1, 1, random.randint(2, 20)))
        lengths.append((num_tokens, computed + num_tokens))
    return lengths


@pytest.mark.parametrize("window", [None, 1, 4, 9, 100])
@pytest.mark.parametrize("seed", range(6))
def test_random_steps_are_what_plain_torch_makes_of_them(seed: int, window: int | None) -> None:
    random = Random(seed)
    lengths = random_lengths(random)
    num_kv_heads = random.choice((1, 2, 3))
    step = make_paged_step(
        lengths,
        num_seqs=len(lengths) + random.choice((0, 3)),
        num_tokens=sum(tokens for tokens, _ in lengths) + random.choice((0, 5)),
        num_heads=num_kv_heads * random.choice((1, 4)),
        num_kv_heads=num_kv_heads,
        seed=seed,
    )
    result = run(make_backend("varlen", CUDA), step, window)
    expected = run(make_backend("torch", CPU), zero_outside_of_sequences(step), window)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("lengths", [[], [(1, 9)], [(3, 9), (1, 4)]], ids=str)
def test_padding_comes_out_as_zeros(lengths: list[tuple[int, int]]) -> None:
    step = make_paged_step(lengths, num_seqs=4, num_tokens=16)
    result = run(make_backend("varlen", CUDA), step, None)
    num_real = sum(tokens for tokens, _ in lengths)
    assert result[:num_real].all()
    assert not result[num_real:].any()


def test_layers_of_a_step_may_differ_in_window_and_in_the_strides_of_queries() -> None:
    step = make_paged_step([(1, 30), (5, 12)])
    dims_first = replace(step, query=step.query.permute(2, 0, 1).contiguous().permute(1, 2, 0))
    attention = make_backend("varlen", CUDA).begin_step(step.batch)
    for layer, window in ((step, None), (dims_first, 7), (dims_first, None)):
        result = attention(
            layer.query, step.key_cache, step.value_cache, scaling=0.3, sliding_window=window, softcap=None, sinks=None
        )
        expected = run(make_backend("torch", CPU), zero_outside_of_sequences(step), window)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_a_model_of_full_and_sliding_layers_in_half_precision_passes_the_check() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        make_backend("varlen", CUDA).check(replace(FACTS, cache_dtype=dtype))


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (replace(FACTS, cache_dtype=torch.float32), r"this model in torch\.float32; set model\.dtype to one of these"),
        (replace(FACTS, has_softcap=True), 'has no soft cap.*set model.attention to "triton" or "auto"'),
        (replace(FACTS, has_sinks=True), "has no attention sinks"),
        (replace(FACTS, layers=[LayerShape(2, 24, 16)]), "layer 0 has key heads of 24 elements and value heads of 16"),
        (replace(FACTS, layers=[LayerShape(2, 20, 20)]), "heads of 20 elements, and FlashAttention takes multiples"),
        (replace(FACTS, layers=[LayerShape(2, 64, 64), LayerShape(2, 264, 264)]), "layer 1 has heads of 264 elements"),
    ],
)
def test_a_model_beyond_it_is_refused_with_the_cure(facts: ProbedModel, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        make_backend("varlen", CUDA).check(facts)


def test_a_machine_that_cannot_do_it_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ConfigError, match=r"needs compute capability 8\.0, and this GPU has 7\.5; set model.attention"):
        make_backend("varlen", CUDA)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    with pytest.raises(ConfigError, match=r"built without FlashAttention; install another build, or set model"):
        make_backend("varlen", CUDA)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.12.1"))
    with pytest.raises(ConfigError, match=r"torch 2\.12\.1 has no block tables in it, 2\.13 and later have"):
        make_backend("varlen", CUDA)


@pytest.mark.parametrize("name", ["triton", "varlen"])
def test_a_backend_of_cuda_is_refused_on_the_cpu_before_anything_is_loaded(
    name: Literal["triton", "varlen"], tmp_path: Path
) -> None:
    config = ModelConfig(path=str(tmp_path / "nowhere"), device="cpu", attention=name)
    shape = StepShape(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64, block_size=256)
    with pytest.raises(ConfigError, match=rf'model.attention \("{name}"\) needs CUDA, and the model runs on cpu: set'):
        load_model(config, CacheConfig(), shape, CPU, lambda *_: None)


@pytest.mark.parametrize(
    ("family", "dtype", "reason"),
    [
        ("gemma2", "bfloat16", "has no soft cap"),
        ("gpt_oss", "bfloat16", "has no attention sinks"),
        ("llama", "float32", r"this model in torch\.float32"),
    ],
)
def test_what_the_probe_sees_of_a_model_is_checked_at_load(
    family: str, dtype: Literal["bfloat16", "float32"], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = make_backend("varlen", CUDA)
    monkeypatch.setattr("workers.gpu.model.loader.make_backend", lambda *_: backend)
    make_tiny_config(family).save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), device="cpu", dtype=dtype, load_format="dummy", num_threads=1)
    shape = StepShape(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64, block_size=4)
    with pytest.raises(ConfigError, match=reason):
        load_model(config, CacheConfig(), shape, CPU, lambda *_: None)
