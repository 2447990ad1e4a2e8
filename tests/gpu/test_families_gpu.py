"""Models of every family on CUDA, captured where they can be: the tokens of `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, Literal

import pytest
import torch

from ipc.records import StepShape
from tests.gpu.test_model_bf16 import OnTheGpu
from tests.reference.executor_engine import executor_engine
from tests.reference.narrow_cache import NUM_NEW, check_logits, make_scaled_model
from tests.reference.packed_steps import PackedSequence, run_packed
from tests.reference.tiny_models import FAMILIES, VOCAB_SIZE, make_tiny_model, reference_generate
from tests.simulation.scripted import ScriptedRequest
from workers.gpu.config import CacheConfig, ModelConfig
from workers.gpu.execution.buckets import Buckets
from workers.gpu.model.loader import load_model

pytestmark = pytest.mark.gpu

SHAPE = StepShape(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=96, block_size=16)
NUM_BLOCKS = 16  # some preemption
NUM_TOKENS = 12
WAIT_IN_FLOAT32 = ("qwen3_moe", "gpt_oss")  # torch has grouped products of experts in bfloat16 only
COMPILED = ("gemma2", "qwen3_moe", "deepseek_v2")  # llama is compiled in test_cuda_executor.py


@pytest.fixture(scope="module")
def device() -> Any:
    from workers.gpu.device.cuda import CudaDevice

    return CudaDevice()


@pytest.mark.parametrize(
    ("family", "compile"), [*((family, "off") for family in FAMILIES), *((family, "on") for family in COMPILED)]
)
def test_captured_steps_of_every_family_give_the_tokens_of_generate(
    family: str, compile: Literal["on", "off"], device: Any, tmp_path: Path
) -> None:
    random = Random(3)
    prompts = [[random.randrange(VOCAB_SIZE) for _ in range(length)] for length in (1, 5, 33, 70, 18)]
    folder = make_tiny_model(family, tmp_path, seed=1)
    expected = reference_generate(folder, prompts, NUM_TOKENS)
    requests = [ScriptedRequest(prompt=prompt, max_tokens=NUM_TOKENS, seed=9 + i) for i, prompt in enumerate(prompts)]
    with torch.inference_mode():
        loaded = load_model(
            ModelConfig(path=str(folder), dtype="float32", compile=compile), CacheConfig(num_blocks=NUM_BLOCKS), SHAPE,
            device.torch_device, lambda *_: None,
        )  # fmt: skip
    assert loaded.can_be_captured or family in WAIT_IN_FLOAT32
    buckets = Buckets(SHAPE, captures=loaded.can_be_captured)
    with executor_engine(device, loaded.runner, SHAPE, 2, NUM_BLOCKS, buckets) as engine:
        engine.executor.warm_up(lambda _: None)
        assert engine.run(requests, seed=5) == expected


@pytest.mark.parametrize("compile", ["off", "on"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_a_cache_of_8_bits_gives_the_logits_of_transformers_with_k_and_v_rounded(
    family: str, compile: Literal["on", "off"], device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_scaled_model(family, tmp_path)
    with torch.inference_mode():
        loaded = load_model(
            ModelConfig(path=str(folder), dtype="float32", compile=compile),
            CacheConfig(num_blocks=NUM_BLOCKS, dtype="fp8_e4m3"), SHAPE, device.torch_device, lambda *_: None,
        )  # fmt: skip
    runner = OnTheGpu(loaded.runner, device.torch_device)

    def generate(prompts: Sequence[Sequence[int]]) -> list[PackedSequence]:
        return run_packed(runner, prompts, NUM_NEW, num_blocks=NUM_BLOCKS, block_size=SHAPE.block_size, seed=3)

    check_logits(folder, generate, monkeypatch)


def test_experts_in_bfloat16_are_captured_and_give_the_same_tokens_at_every_depth(device: Any, tmp_path: Path) -> None:
    folder = make_tiny_model("qwen3_moe", tmp_path, seed=1)
    with torch.inference_mode():
        loaded = load_model(
            ModelConfig(path=str(folder), dtype="bfloat16", compile="off"), CacheConfig(num_blocks=NUM_BLOCKS), SHAPE,
            device.torch_device, lambda *_: None,
        )  # fmt: skip
    assert loaded.can_be_captured
    runs = []
    for depth in (1, 2):
        with executor_engine(device, loaded.runner, SHAPE, depth, NUM_BLOCKS, Buckets(SHAPE)) as engine:
            engine.executor.warm_up(lambda _: None)
            request = ScriptedRequest(prompt=[5, 7, 11], max_tokens=NUM_TOKENS)
            runs.append(engine.run([request], seed=1))
    assert runs[0] == runs[1]
