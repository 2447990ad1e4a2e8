"""The 8B model in bfloat16 on the GPU, and a shrunk one: logits beside transformers', and the same at every depth."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from ipc.records import StepShape
from tests.reference.executor_engine import Steady, executor_engine
from tests.reference.packed_steps import run_packed
from tests.simulation.scripted import ScriptedRequest
from workers.gpu.config import CacheConfig, ModelConfig
from workers.gpu.execution.buckets import Buckets
from workers.gpu.execution.step_batch import StepBatch
from workers.gpu.model.loader import LoadedModel, load_config, load_model, load_weights

pytestmark = pytest.mark.gpu

SHAPE = StepShape(max_num_seqs=8, max_num_batched_tokens=2048, max_model_len=1024, block_size=16)
NUM_BLOCKS = 8 * 64
NEW_TOKENS = 16
PROMPT_LENGTHS = (3, 64, 257, 700)
# Of the norm of a row of logits, by the number of layers. A rounding to bfloat16 (8 bits of mantissa) is 0.4 %: four
# layers of them end at about 1 %, 32 at 6 % (transformers' own at 9).
ABSOLUTE_TOLERANCE = {4: 3e-2, 32: 0.1}
# Ours rounds elsewhere than the eager forward does, not more coarsely: its error may not be much larger.
RELATIVE_TOLERANCE = 1.5
LLAMA_8B = Path(__file__).parents[2] / "configs/shapes/llama-3.1-8b"
SHRUNK = {  # a quarter of its width, an eighth of its layers, the same groups and head size
    "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module", params=[SHRUNK, {}], ids=["shrunk", "8b"])
def model_config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """Llama 3.1 8B with random weights, which are the same whenever it is loaded."""
    folder = tmp_path_factory.mktemp("model") / "llama"
    folder.mkdir()
    shape = json.loads((LLAMA_8B / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(shape | request.param))
    return ModelConfig(path=str(folder), dtype="bfloat16", load_format="dummy")


@pytest.fixture(scope="module")
def device() -> Any:
    from workers.gpu.device.cuda import CudaDevice

    return CudaDevice()


@pytest.fixture(scope="module")
def loaded(model_config: ModelConfig, device: Any) -> LoadedModel:
    with torch.inference_mode():
        return load_model(model_config, CacheConfig(num_blocks=NUM_BLOCKS), SHAPE, device.torch_device, lambda *_: None)


@pytest.fixture(scope="module")
def references(model_config: ModelConfig, device: Any) -> Iterator[dict[torch.dtype, Any]]:
    """The same weights in plain transformers, with the attention written out: in float32 and in bfloat16."""
    models: dict[torch.dtype, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model: Any = load_weights(model_config, load_config(model_config.path), device.torch_device, lambda *_: None)
        model.set_attn_implementation("eager")
        models[dtype] = model.float() if dtype == torch.float32 else model  # which keeps some tensors in float32
    yield models
    models.clear()


def prompts_of(lengths: Sequence[int], vocab_size: int, seed: int) -> list[list[int]]:
    random = Random(seed)
    return [[random.randrange(vocab_size) for _ in range(length)] for length in lengths]


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
    """The plain forwards get the tokens that the packed steps generated, so that both have the same prefix."""
    sequences = run_packed(
        OnTheGpu(loaded.runner, device.torch_device), prompts_of(PROMPT_LENGTHS, loaded.runner.vocab_size, 1),
        NEW_TOKENS, num_blocks=NUM_BLOCKS, block_size=SHAPE.block_size, max_chunk=max_chunk, seed=2,
    )  # fmt: skip
    tolerance = ABSOLUTE_TOLERANCE[references[torch.float32].config.num_hidden_layers]
    for sequence in sequences:
        exact, eager = (
            plain_logits(references[dtype], sequence.token_ids[:-1])[-NEW_TOKENS:]
            for dtype in (torch.float32, torch.bfloat16)
        )
        ours = errors(torch.stack(sequence.logits), exact)
        theirs = errors(eager, exact)
        where = f"{what}, prompt of {sequence.num_prompt_tokens}: {ours.max():.1e}, transformers {theirs.max():.1e}"
        assert ours.max() < tolerance, where
        assert ours.mean() < RELATIVE_TOLERANCE * theirs.mean() + 1e-3, where


@pytest.mark.parametrize("is_captured", [False, True])
def test_tokens_are_identical_at_every_depth_where_the_steps_are(
    is_captured: bool, loaded: LoadedModel, device: Any
) -> None:
    """All arrive first, none ends early, all are of one length: then every depth runs the same batches."""
    prompts = prompts_of([96] * 8, loaded.runner.vocab_size, 3)
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
