"""A bfloat16 model of the 8B's proportions on the GPU: its logits beside transformers', and the same at every depth."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import transformers

from ipc.records import StepShape
from tests.reference.executor_engine import Steady, executor_engine
from tests.reference.packed_steps import run_packed
from tests.simulation.scripted import ScriptedRequest
from workers.gpu.batch import StepBatch
from workers.gpu.buckets import Buckets
from workers.gpu.config import CacheConfig, ModelConfig
from workers.gpu.model.loader import LoadedModel, load_model

pytestmark = pytest.mark.gpu

VOCAB_SIZE = 8192
SHAPE = StepShape(max_num_seqs=8, max_num_batched_tokens=2048, max_model_len=1024, block_size=16)
NUM_BLOCKS = 8 * 64
NEW_TOKENS = 16
PROMPT_LENGTHS = (3, 64, 257, 700)
# Of the norm of a row of logits. Four layers of bfloat16 (8 bits of mantissa: 0.4 % a rounding) end at about 1 %.
ABSOLUTE_TOLERANCE = 3e-2
# Ours rounds elsewhere than the eager forward does, not more coarsely: its error may not be much larger.
RELATIVE_TOLERANCE = 1.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama 3.1 8B, shrunk: a quarter of its width, an eighth of its layers, the same groups and head size."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=1024, intermediate_size=3584, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=128, max_position_embeddings=1024, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model") / "llama"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def device() -> Any:
    from workers.gpu.device.cuda import CudaDevice

    return CudaDevice()


@pytest.fixture(scope="module")
def loaded(folder: Path, device: Any) -> LoadedModel:
    with torch.inference_mode():
        return load_model(
            ModelConfig(path=str(folder)), CacheConfig(num_blocks=NUM_BLOCKS), SHAPE, device.torch_device,
            lambda *_: None,
        )  # fmt: skip


@pytest.fixture(scope="module")
def references(folder: Path) -> Iterator[dict[torch.dtype, Any]]:
    """The same weights in plain transformers, with the attention written out: in float32 and in bfloat16."""
    models = {
        dtype: transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", local_files_only=True
        )
        .cuda()
        .eval()
        for dtype in (torch.float32, torch.bfloat16)
    }
    yield models
    models.clear()


def prompts_of(lengths: Sequence[int], seed: int) -> list[list[int]]:
    random = Random(seed)
    return [[random.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]


class OnTheGpu:
    """The runner, for batches that are made on the host."""

    def __init__(self, runner: Any, device: torch.device) -> None:
        self._runner = runner
        self._device = device

    def logits(self, batch: StepBatch) -> torch.Tensor:
        tensors = {
            field.name: getattr(batch, field.name).to(self._device)
            for field in dataclasses.fields(batch)
            if isinstance(getattr(batch, field.name), torch.Tensor)
        }
        logits: torch.Tensor = self._runner.logits(dataclasses.replace(batch, **tensors))
        return logits.float().cpu()


@torch.inference_mode()
def plain_logits(model: Any, token_ids: Sequence[int]) -> torch.Tensor:
    """[len(token_ids), vocab_size] float32 of one plain forward."""
    logits: torch.Tensor = model(input_ids=torch.tensor([list(token_ids)], device="cuda"), use_cache=False).logits[0]
    return logits.float().cpu()


def errors(logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """[rows]: of each row, the norm of the difference by the norm."""
    return (logits - expected).norm(dim=-1) / expected.norm(dim=-1)


@pytest.mark.parametrize(("max_chunk", "what"), [(1024, "whole prompts"), (48, "chunks beside decodes")])
def test_logits_are_as_near_to_float32_as_those_of_transformers_own_forward(
    max_chunk: int, what: str, loaded: LoadedModel, references: dict[torch.dtype, Any], device: Any
) -> None:
    """On the same prefix: what the packed steps generated is given to the plain forwards."""
    sequences = run_packed(
        OnTheGpu(loaded.runner, device.torch_device), prompts_of(PROMPT_LENGTHS, 1), NEW_TOKENS,
        num_blocks=NUM_BLOCKS, block_size=SHAPE.block_size, max_chunk=max_chunk, seed=2,
    )  # fmt: skip
    for sequence in sequences:
        exact, eager = (
            plain_logits(references[dtype], sequence.token_ids[:-1])[-NEW_TOKENS:]
            for dtype in (torch.float32, torch.bfloat16)
        )
        ours = errors(torch.stack(sequence.logits), exact)
        theirs = errors(eager, exact)
        where = f"{what}, prompt of {sequence.num_prompt_tokens}: {ours.max():.1e}, transformers {theirs.max():.1e}"
        assert ours.max() < ABSOLUTE_TOLERANCE, where
        assert ours.mean() < RELATIVE_TOLERANCE * theirs.mean() + 1e-3, where


@pytest.mark.parametrize("is_captured", [False, True])
def test_tokens_are_identical_at_every_depth_where_the_steps_are(
    is_captured: bool, loaded: LoadedModel, device: Any
) -> None:
    """All arrive first, none ends early, all are of one length: then every depth runs the same batches."""
    prompts = prompts_of([96] * 8, 3)
    runs = []
    for depth in (1, 2, 3):
        buckets = Buckets(SHAPE) if is_captured else None
        with executor_engine(device, loaded.runner, SHAPE, depth, NUM_BLOCKS, buckets) as engine:
            tokens = engine.run([ScriptedRequest(prompt, 128) for prompt in prompts], Steady())
            runs.append((engine.steps_run, tokens))
    assert runs[0][0] == [(8, 8 * 96)] + [(8, 8)] * 127
    assert len({token for tokens in runs[0][1] for token in tokens}) > 50, "the model says too little to compare"
    assert runs[1] == runs[0]
    assert runs[2] == runs[0]
