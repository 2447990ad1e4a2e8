"""Logits left where they are wanted: by the head itself, or, where a model makes something of them, by a copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ipc.records import StepShape
from tests.reference.packed_steps import PackedSequence, make_batch
from tests.reference.tiny_models import FAMILIES, make_tiny_model
from workers.gpu.config import CacheConfig, ModelConfig
from workers.gpu.execution.step_batch import StepBatch
from workers.gpu.model.head import Head
from workers.gpu.model.loader import load_model

SHAPE = StepShape(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=32, block_size=4)


def a_batch(trash_block: int) -> StepBatch:
    sequences = [PackedSequence(row, [3 + row, 9, 4, 7], 4, []) for row in (0, 1)]
    table = torch.full((3, SHAPE.max_blocks_per_seq), trash_block, dtype=torch.int32)
    table[0, 0], table[1, 0] = 0, 1
    return make_batch([(sequence, 4) for sequence in sequences], table, SHAPE.block_size, num_padding_seqs=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_same_where_they_are_wanted(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(path=str(make_tiny_model(family, tmp_path)), dtype="float32", device="cpu", num_threads=1)
    with torch.inference_mode():
        loaded = load_model(config, CacheConfig(), SHAPE, torch.device("cpu"), lambda *_: None)
        runner, batch = loaded.runner, a_batch(loaded.num_blocks)
        expected = runner.logits(batch).clone()
        buffer = torch.full((SHAPE.max_num_seqs, runner.vocab_size), torch.nan)
        copies = []
        monkeypatch.setattr(torch.Tensor, "copy_", _counting(torch.Tensor.copy_, buffer, copies))
        assert runner.logits(batch, out=buffer[:3]).data_ptr() == buffer.data_ptr()
    assert torch.equal(buffer[:3], expected)
    assert buffer[3:].isnan().all()
    changes_logits = getattr(loaded.runner._model.config, "final_logit_softcapping", None) or family == "granite"
    assert len(copies) == (1 if changes_logits else 0)
    assert runner._head is not None
    assert runner._head.out is None, "a later call would write there too"


def _counting(copy: Any, target: torch.Tensor, copies: list[torch.Tensor]) -> Any:
    def counted(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.data_ptr() == target.data_ptr():
            copies.append(self)
        result: torch.Tensor = copy(self, *args, **kwargs)
        return result

    return counted


def test_a_head_takes_only_what_fits() -> None:
    layer = torch.nn.Linear(8, 16, bias=False)
    head, x = Head(layer), torch.randn(2, 3, 8)
    expected = layer(x)
    head.out = torch.full((5, 16), 7.0)  # of other rows than the call's
    assert torch.equal(head(x), expected)
    assert (head.out == 7.0).all()
    head.out = torch.empty(6, 16)
    with torch.inference_mode():
        assert torch.equal(head(x), expected)
        assert torch.equal(head.out.view(2, 3, 16), expected)
