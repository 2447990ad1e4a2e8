"""Fused projections: found by watching, exact, and gone again when undone."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ipc.records import StepShape
from tests.reference.tiny_models import make_tiny_model
from workers.gpu.config import CacheConfig, ModelConfig
from workers.gpu.model import loader
from workers.gpu.model.fusion import FusedProjections, Projections, find_projections, fuse_projections

SHAPE = StepShape(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=64, block_size=4)


class Block(nn.Module):
    """Projections that belong together, and others that only look so."""

    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, size, bias=bias) for size in (12, 4, 4))
        self.out = nn.Linear(12, 8)
        self.gate, self.up = nn.Linear(8, 6), nn.Linear(8, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = self.query(x) * (self.key(x) + self.value(x)).repeat(1, 3)
        x = x + self.out(mixed)
        return self.gate(x) * self.up(x)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x) + self.second(x)
        return self.first(x) + self.second(x)


def find(module: nn.Module) -> list[Projections]:
    return find_projections(module, lambda: module(torch.ones(3, 8)))


@pytest.mark.parametrize("bias", [False, True])
def test_a_group_is_what_takes_one_tensor_in_a_row_and_computes_the_same_when_fused(bias: bool) -> None:
    block = Block(bias=bias)
    x = torch.randn(3, 8)
    expected = block(x)
    groups = find(block)
    assert [group.names for group in groups] == [("query", "key", "value")], "gate and up differ in having a bias"
    fuse_projections(groups)
    torch.testing.assert_close(block(x), expected)
    assert isinstance(block.query, FusedProjections)
    assert not block.query.parts, "a part is kept beyond the forward"


def test_fusing_holds_the_weights_once_and_undoing_it_gives_the_layers_back() -> None:
    block = Block()
    layers = [block.query, block.key, block.value]
    weights = [layer.weight.clone() for layer in layers]
    undo = fuse_projections(find(block))
    fused = block.query
    assert isinstance(fused, FusedProjections)
    storage = fused.joined.weight.untyped_storage()
    assert all(layer.weight.untyped_storage().data_ptr() == storage.data_ptr() for layer in layers)
    assert storage.nbytes() == sum(weight.nbytes for weight in weights)
    undo()
    assert [block.query, block.key, block.value] == layers
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, weights, strict=True))


def test_layers_that_a_forward_calls_twice_stay_apart() -> None:
    assert find(Twice()) == []


class Named(nn.Module):
    """Passes its input on by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first: torch.Tensor = self.first(input=x) + self.second(input=2 * x)
        return first


def test_layers_that_take_their_input_by_name_stay_apart() -> None:
    assert find(Named()) == []


def loaded_model(folder: Path) -> Any:
    config = ModelConfig(path=str(folder), dtype="float32", device="cpu", num_threads=1)
    return loader.load_model(config, CacheConfig(), SHAPE, torch.device("cpu"), lambda *_: None).runner._model


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")}),
        ("qwen3_moe", {("q_proj", "k_proj", "v_proj")}),
        ("deepseek_v2", {("q_proj", "kv_a_proj_with_mqa"), ("gate_proj", "up_proj")}),
        ("phi3", set()),  # fused by its authors
    ],
)
def test_each_layer_of_a_loaded_model_is_fused(family: str, names: set[tuple[str, ...]], tmp_path: Path) -> None:
    model = loaded_model(make_tiny_model(family, tmp_path))
    fused = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, FusedProjections)}
    assert fused == {group[0] for group in names}
    num_fused = sum(isinstance(module, FusedProjections) for module in model.modules())
    assert num_fused == len(names) * model.config.num_hidden_layers


def test_a_model_that_looks_into_its_projections_runs_without_fused_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        up: torch.Tensor = self.up_proj(x) if self.gate_proj.weight.shape == self.up_proj.weight.shape else x
        return self.down_proj(self.act_fn(self.gate_proj(x)) * up)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    with caplog.at_level(logging.WARNING):
        model = loaded_model(make_tiny_model("llama", tmp_path))
    assert "without fused projections" in caplog.text
    assert not any(isinstance(module, FusedProjections) for module in model.modules())


def test_memory_that_runs_out_beside_fused_projections_is_no_fault_of_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(FusedProjections, "forward", forward)
    with pytest.raises(torch.OutOfMemoryError):
        loaded_model(make_tiny_model("llama", tmp_path))
