"""Compiled layers: the same tokens, one graph for all layers of a kind, and eager layers where compiling fails.

The graphs run directly here, without generated code, because code generation is torch's task.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.registry import lookup_backend

from ipc.errors import ConfigError
from ipc.records import StepShape
from tests.reference.packed_steps import run_packed
from tests.reference.tiny_models import VOCAB_SIZE, generate_greedily, make_tiny_model, reference_model
from workers.gpu.attention.backend import make_backend
from workers.gpu.config import CacheConfig, ModelConfig
from workers.gpu.model.compile import cache_folder, compile_layers, decoder_layers, neighbours
from workers.gpu.model.gate import probe_model
from workers.gpu.model.loader import LoadedModel, load_model
from workers.gpu.model.step_memory import largest_step

SHAPE = StepShape(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=64, block_size=4)
MAX_NEW_TOKENS = 8
NUM_BESIDE = 2  # modules beside the layers: the last norm and the rotary angles


@pytest.fixture(autouse=True)
def _fresh_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def load(folder: Path) -> LoadedModel:
    config = ModelConfig(path=str(folder), dtype="float32", device="cpu", num_threads=1)
    return load_model(config, CacheConfig(), SHAPE, torch.device("cpu"), lambda *_: None)


def step_of(loaded: LoadedModel) -> Any:
    model: Any = loaded.runner._model
    facts = probe_model(model, SHAPE.max_model_len, torch.device("cpu"))
    return model, largest_step(model, facts, SHAPE, torch.device("cpu"), make_backend("torch", torch.device("cpu")))


@pytest.mark.parametrize(("family", "num_graphs"), [("llama", 1), ("gemma2", 2)])
def test_compiled_layers_give_the_tokens_of_generate_from_a_graph_for_each_kind_of_layer(
    family: str, num_graphs: int, tmp_path: Path
) -> None:
    random = Random(4)
    prompts = [[random.randrange(VOCAB_SIZE) for _ in range(length)] for length in (2, 13, 26, 41)]
    folder = make_tiny_model(family, tmp_path / "model", seed=1)
    reference = reference_model(folder)
    expected = [generate_greedily(reference, prompt, MAX_NEW_TOKENS) for prompt in prompts]

    loaded = load(folder)
    model, step = step_of(loaded)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    assert compile_layers(model, step, backend=backend) is not None
    assert len(graphs) == num_graphs + NUM_BESIDE, "layers of one kind do not share a graph"
    sequences = run_packed(loaded.runner, prompts, MAX_NEW_TOKENS, num_blocks=loaded.num_blocks, seed=3)
    assert [sequence.generated for sequence in sequences] == expected
    assert len(graphs) <= 2 * (num_graphs + NUM_BESIDE), "a batch of more than one token was compiled again"


def test_what_is_beside_the_layers_is_compiled_unless_it_is_torchs_own(tmp_path: Path) -> None:
    for family, names in (("llama", ["LlamaRMSNorm", "LlamaRotaryEmbedding"]), ("gpt2", [])):
        model: Any = load(make_tiny_model(family, tmp_path / family)).runner._model
        assert [type(module).__name__ for module in neighbours(model, decoder_layers(model))] == names


def test_layers_stay_compiled_where_what_is_beside_them_cannot_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load(make_tiny_model("llama", tmp_path / "model"))
    model, step = step_of(loaded)
    expected = step()
    norm = model.model.norm
    inner = norm.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return inner(x)

    norm.forward = forward
    with caplog.at_level(logging.INFO):
        assert compile_layers(model, step, backend="aot_eager") is not None
    assert "the modules beside the model's layers run without torch.compile" in caplog.text
    assert norm._compiled_call_impl is None
    assert decoder_layers(model)[0]._compiled_call_impl is not None
    assert torch.equal(step(), expected)


class Layer(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.attention = nn.Identity()
        self.attention.layer_idx = index
        self.experts = nn.ModuleList(nn.Identity() for _ in range(3))


class Odd(nn.Module):
    """Its vision tower, which no step runs, is deeper than its decoder, and each layer has more experts still."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.tower = nn.ModuleList(nn.Identity() for _ in range(5))
        self.layers = nn.ModuleList(Layer(index) for index in range(num_layers))


def test_decoder_layers_are_those_with_attention_however_long_other_lists_are() -> None:
    model = Odd(2)
    assert decoder_layers(model) == list(model.layers)


def test_a_model_without_a_list_of_layers_is_not_called_compiled(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert compile_layers(Odd(0), lambda: None) is None
    assert "runs without torch.compile" in caplog.text


def test_a_model_that_cannot_be_compiled_runs_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = load(make_tiny_model("llama", tmp_path / "model"))
    model, step = step_of(loaded)
    expected = step()
    layer = decoder_layers(model)[1]
    inner = layer.mlp.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return inner(x)

    layer.mlp.forward = forward
    with caplog.at_level(logging.WARNING):
        assert compile_layers(model, step, backend="aot_eager") is None
    assert "runs without torch.compile" in caplog.text
    assert torch.equal(step(), expected)


def test_what_is_kept_between_starts_lies_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("products") == tmp_path / "ringfeed" / "products"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/somewhere")
    assert cache_folder("products") == Path("/somewhere/.cache/ringfeed/products")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(Path, "home", raising(RuntimeError("Could not determine home directory.")))
    with pytest.raises(ConfigError, match="set HOME or XDG_CACHE_HOME"):
        cache_folder("products")


def raising(error: Exception) -> Any:
    def fail() -> None:
        raise error

    return fail


def test_code_kept_on_disk_is_marked_with_the_signatures_of_the_operators_that_it_calls(tmp_path: Path) -> None:
    model, step = step_of(load(make_tiny_model("llama", tmp_path)))
    with torch.compiler.config.patch(cache_key_tag="of another model"):
        for _ in range(2):
            compile_layers(model, step, backend="eager")
            for operator in ("multiply", "multiply_gated", "paged_attention"):
                assert torch.compiler.config.cache_key_tag.count(f"ringfeed::{operator}(Tensor") == 1
            assert "another" not in torch.compiler.config.cache_key_tag
