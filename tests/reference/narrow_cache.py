"""A tiny model with a KV cache of 8 bits, beside transformers with K and V rounded to 8 bits."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.reference.packed_steps import PackedSequence
from tests.reference.tiny_models import VOCAB_SIZE, make_tiny_model, reference_logits, reference_model
from workers.gpu.memory.kv_cache import KVScales, quantize

NUM_NEW: Final = 4
PROMPT_LENGTHS: Final = (2, 13, 41)
# Of up to four layers. 0.01 makes K of 4.5 saturate, which these models have.
SCALES: Final = (KVScales(0.05, 0.02), KVScales(0.01, 0.03), KVScales(), KVScales(0.2, 0.3))


def make_scaled_model(family: str, folder: Path) -> Path:
    """Save a tiny model, with a scale of K and one of V for each layer among its tensors; returns its folder."""
    make_tiny_model(family, folder, seed=1)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for index, layer in enumerate(SCALES):
        tensors[f"model.layers.{index}.self_attn.k_scale"] = torch.tensor(layer.key)
        tensors[f"model.layers.{index}.self_attn.v_scale"] = torch.tensor([layer.value])
    save_file(tensors, file, {"format": "pt"})
    return folder


def check_logits(
    folder: Path,
    generate: Callable[[Sequence[Sequence[int]]], Sequence[PackedSequence]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Check the logits of `generate`, which generates NUM_NEW tokens greedily for each prompt.

    A rounding of float32 may change how a number is rounded to 8 bits, and with it all later tokens. That is rare, and
    a small part of the difference that 8 bits make.
    """
    rng = random.Random(2)
    sequences = generate([[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in PROMPT_LENGTHS])
    reference = reference_model(folder)
    plain = [reference_logits(reference, sequence.token_ids[:-1])[-NUM_NEW:] for sequence in sequences]
    _round_kv(reference, monkeypatch)
    rounded = [reference_logits(reference, sequence.token_ids[:-1])[-NUM_NEW:] for sequence in sequences]
    errors = []
    for sequence, exact, expected in zip(sequences, plain, rounded, strict=True):
        of_8_bits = (expected - exact).norm() / exact.norm()
        assert 0.01 < of_8_bits < 0.5, "attention of these wide weights is sharp"
        errors.append(float((torch.stack(sequence.logits).float().cpu() - expected).norm() / exact.norm()))
        assert errors[-1] < 0.15 * of_8_bits
    assert min(errors) < 1e-4


def _round_kv(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a reference model round K and V to 8 bits before its attention."""
    modeling = sys.modules[type(model).__module__]
    attend = modeling.eager_attention_forward  # type: ignore[attr-defined]

    def attend_rounded(module: Any, query: Any, key: torch.Tensor, value: torch.Tensor, *rest: Any, **more: Any) -> Any:
        layer = SCALES[module.layer_idx]
        key = quantize(key, layer.key).float() * layer.key
        value = quantize(value, layer.value).float() * layer.value
        return attend(module, query, key, value, *rest, **more)

    monkeypatch.setattr(modeling, "eager_attention_forward", attend_rounded)
