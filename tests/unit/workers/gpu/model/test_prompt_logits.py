"""Logits at the tokens of prompts: the model's own, in pieces, with all that its forward does to them."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from ipc.records import StepShape
from tests.reference.packed_steps import PackedSequence, make_batch
from tests.reference.tiny_models import VOCAB_SIZE, make_tiny_model, reference_logits, reference_model
from workers.gpu.config import CacheConfig, ModelConfig
from workers.gpu.model.decoder_output import DecoderOutput
from workers.gpu.model.loader import load_model
from workers.gpu.model.paged_runner import PagedModelRunner

SHAPE = StepShape(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=64, block_size=4)
BLOCKS_PER_SEQ = 8

torch.set_num_threads(1)


def load(folder: Path) -> PagedModelRunner:
    config = ModelConfig(path=str(folder), dtype="float32", device="cpu", num_threads=1)
    return load_model(config, CacheConfig(num_blocks=40), SHAPE, torch.device("cpu"), lambda *_: None).runner


def check(runner: PagedModelRunner, folder: Path) -> None:
    """Two prompts in two steps each: every token's logits are those of a plain forward, and so are the last ones."""
    random = Random(4)
    prompts = [[random.randrange(VOCAB_SIZE) for _ in range(length)] for length in (19, 23)]
    expected = [reference_logits(reference_model(folder), prompt) for prompt in prompts]
    table = torch.arange(3 * BLOCKS_PER_SEQ, dtype=torch.int32).reshape(3, BLOCKS_PER_SEQ)
    table[2] = 40  # the trash block
    sequences = [PackedSequence(row, prompts[row], len(prompts[row]), []) for row in range(2)]
    for counts in ((8, 15), (11, 8)):
        scheduled = list(zip(sequences, counts, strict=True))
        batch = make_batch(scheduled, table, SHAPE.block_size, num_padding_tokens=3, num_padding_seqs=1)
        tokens = [(s.row, s.num_computed_tokens + i) for s, count in scheduled for i in range(count)]
        places = random.sample(range(len(tokens)), len(tokens) - 2)
        out = torch.empty(batch.num_seqs, VOCAB_SIZE)
        pieces = list(runner.prompt_logits(batch, torch.tensor(places), 5, out=out))
        assert max(map(len, pieces)) == 5
        plain = torch.stack([expected[row][position] for row, position in (tokens[place] for place in places)])
        near = {"rtol": 1e-5, "atol": 2e-5 * float(plain.abs().max())}
        torch.testing.assert_close(torch.cat(pieces), plain, **near)
        for sequence, count in scheduled:
            sequence.num_computed_tokens += count
        last = torch.stack([expected[s.row][s.num_computed_tokens - 1] for s in sequences])
        torch.testing.assert_close(out[:2], last, **near)
        torch.testing.assert_close(runner.logits(batch), out, **near)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "gpt2", "gpt_oss"])
def test_every_familys_own_forward_turns_hidden_states_into_logits(family: str, tmp_path: Path) -> None:
    folder = make_tiny_model(family, tmp_path, seed=1)
    runner = load(folder)
    check(runner, folder)
    calls: list[int] = []
    model: Any = runner._model
    layer = model.get_decoder().h[0] if family == "gpt2" else model.model.layers[0]
    layer.register_forward_hook(lambda *_: calls.append(1))
    check(runner, folder)
    assert len(calls) == 4, "two steps with log-probabilities and two without run the layers once each"


def test_a_model_that_scales_and_caps_its_logits_needs_more_than_its_head(tmp_path: Path) -> None:
    """Cohere multiplies its logits. The head alone would give other log-probabilities."""
    from transformers import CohereConfig

    from tests.reference.tiny_models import save_model

    config = CohereConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, logit_scale=0.25, pad_token_id=0,
    )  # fmt: skip
    folder = save_model(config, tmp_path)
    check(load(folder), folder)


def test_without_a_decoder_of_its_own_a_model_computes_all_logits_in_its_one_forward(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path, seed=1)
    runner = load(folder)
    runner._decoder_output = None
    check(runner, folder)


def test_a_decoder_is_itself_again_after_a_failure(tmp_path: Path) -> None:
    runner = load(make_tiny_model("llama", tmp_path))
    model: Any = runner._model
    kept = DecoderOutput.of(model)
    assert kept is not None
    with pytest.raises(ZeroDivisionError), kept.kept():
        1 / 0  # noqa: B018
    assert "forward" not in vars(model.model)
    with pytest.raises(AssertionError, match="called its decoder 0 times"), kept.replayed([]):
        pass
