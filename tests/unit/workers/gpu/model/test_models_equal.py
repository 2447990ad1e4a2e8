"""Packed, paged, chunked steps give the tokens of `model.generate`, id for id, and the logits of a plain forward."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Literal

import pytest
import torch

from ipc.records import StepShape
from tests.reference.packed_steps import run_packed
from tests.reference.tiny_models import (
    FAMILIES,
    VOCAB_SIZE,
    generate_greedily,
    make_tiny_model,
    reference_logits,
    reference_model,
)
from workers.gpu.config import CacheConfig, ModelConfig
from workers.gpu.model.loader import LoadedModel, load_model

PROMPT_LENGTHS = (1, 2, 5, 13, 26, 41)
MAX_NEW_TOKENS = 12
SHAPE = StepShape(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=64, block_size=4)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def load(folder: Path, dtype: Literal["float32", "bfloat16"] = "float32") -> LoadedModel:
    config = ModelConfig(path=str(folder), dtype=dtype, device="cpu", num_threads=1)
    return load_model(config, CacheConfig(), SHAPE, torch.device("cpu"), lambda *_: None)


def random_prompts(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in PROMPT_LENGTHS]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_steps_give_the_tokens_and_logits_of_plain_transformers(family: str, tmp_path: Path) -> None:
    folder = make_tiny_model(family, tmp_path, seed=1)
    prompts = random_prompts(seed=2)
    model = reference_model(folder)
    expected = [generate_greedily(model, prompt, MAX_NEW_TOKENS) for prompt in prompts]
    assert len({token for tokens in expected for token in tokens}) > 10, "the model says too little to compare"

    loaded = load(folder)
    for seed in (3, 4):
        sequences = run_packed(loaded.runner, prompts, MAX_NEW_TOKENS, num_blocks=loaded.num_blocks, seed=seed)
        assert [sequence.generated for sequence in sequences] == expected
        for sequence in sequences:
            plain = reference_logits(model, sequence.token_ids[:-1])[-MAX_NEW_TOKENS:]
            packed = torch.stack(sequence.logits)
            torch.testing.assert_close(packed, plain, rtol=1e-5, atol=2e-5 * float(plain.abs().max()))


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe", "gpt_oss"])
def test_bfloat16_models_pass_the_gate_and_run(family: str, tmp_path: Path) -> None:
    """Roundings differ with the batch there, so greedy tokens are not compared: `run_packed` asserts finite logits."""
    loaded = load(make_tiny_model(family, tmp_path, seed=1), "bfloat16")
    sequences = run_packed(loaded.runner, random_prompts(seed=2), 4, num_blocks=loaded.num_blocks)
    assert {logits.dtype for sequence in sequences for logits in sequence.logits} == {torch.bfloat16}
