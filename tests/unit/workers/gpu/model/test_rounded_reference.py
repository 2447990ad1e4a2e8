"""The oracle of quantised models: values that are rounded by definition, in transformers' own forward."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.reference.dequantized import (
    decoder_linears,
    fp8_per_row,
    round_activations,
    round_kv,
    round_weights,
    through_e4m3,
)
from tests.reference.tiny_models import make_tiny_model, reference_logits, reference_model

TOKENS = [5, 9, 100, 42, 7, 7, 150]


def test_a_row_keeps_its_largest_value_and_rounds_the_others_to_four_binary_digits() -> None:
    weight = torch.tensor([[448.0, 17.0, -17.5, 0.0], [44.8, 1.7, -1.75, 0.0], [0.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([[448.0, 16.0, -18.0, 0.0], [44.8, 1.6, -1.8, 0.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(fp8_per_row(weight), expected)


def test_values_beyond_the_range_saturate_and_nan_stays_nan() -> None:
    rounded = through_e4m3(torch.tensor([1e6, -math.inf, 449.0, math.nan]))
    assert rounded[:3].tolist() == [448, -448, 448]
    assert rounded[3].isnan()


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt_oss"])
def test_only_linear_layers_of_decoder_layers_are_rounded(family: str, tmp_path: Path) -> None:
    model = reference_model(make_tiny_model(family, tmp_path))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    count = round_weights(model)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert len(changed) == count == len(list(decoder_linears(model)))
    assert all(".layers." in name and name.endswith("proj.weight") for name in changed)


def test_activations_are_rounded_token_by_token(tmp_path: Path) -> None:
    model = reference_model(make_tiny_model("llama", tmp_path))
    layer = next(layer for _, layer in decoder_linears(model))
    x = torch.randn(3, layer.in_features) * torch.tensor([[1.0], [1e3], [1e-3]])
    expected = layer(fp8_per_row(x))
    round_activations(model)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_rounded_kv_leaves_the_familys_attention_as_it_is(family: str, tmp_path: Path) -> None:
    folder = make_tiny_model(family, tmp_path)
    plain = reference_logits(reference_model(folder), TOKENS)
    model = reference_model(folder)
    round_kv(model, lambda values: values)
    torch.testing.assert_close(reference_logits(model, TOKENS), plain)
    round_kv(model)
    rounded = reference_logits(model, TOKENS)
    assert 1e-3 < float((rounded - plain).abs().max() / plain.abs().max()) < 0.5


def test_kv_is_divided_by_its_layers_scales_before_it_is_rounded(tmp_path: Path) -> None:
    model = reference_model(make_tiny_model("llama", tmp_path))
    round_kv(model, lambda values: (16 * values).round() / 16)
    expected = reference_logits(model, TOKENS)
    round_kv(model, torch.round, scales=dict.fromkeys(range(3), (1 / 16, 1 / 16)))
    torch.testing.assert_close(reference_logits(model, TOKENS), expected)
    round_kv(model, torch.round, scales={1: (1 / 16, 1 / 16)})
    assert not torch.allclose(reference_logits(model, TOKENS), expected, rtol=1e-2)
