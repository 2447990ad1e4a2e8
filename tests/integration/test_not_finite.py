"""A model whose weights are finite and whose activations overflow for one token id, in a running engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file, save_file

from ipc.errors import LogitsNotFinite
from pipeline import Pipeline, SamplingParams
from tests.reference.tiny_models import make_tiny_model
from tests.unit.text_tools import byte_level_tokenizer

OVERFLOWING = 99
PARAMS = SamplingParams(max_tokens=8)
BEGINNING = [(7 * i) % 80 + 5 for i in range(48)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """In float16. The cache is small, so that its blocks are used again and again."""
    folder = make_tiny_model("llama", tmp_path_factory.mktemp("overflow"), seed=5)
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][:, 31] = 0
    weights["model.embed_tokens.weight"][OVERFLOWING, 31] = 8.0
    weights["model.layers.0.self_attn.o_proj.weight"][31] = 0  # this component comes from the embedding alone
    for name in ("gate_proj", "up_proj"):
        weights[f"model.layers.0.mlp.{name}.weight"][0, 31] = 600.0  # and their product does not fit float16
    halves = {name: tensor.half() for name, tensor in weights.items()}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in halves.values())
    save_file(halves, folder / "model.safetensors", {"format": "pt"})
    config = {
        "model": {"path": str(folder), "dtype": "float16", "device": "cpu", "num_threads": 1},
        "scheduler": {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 96},
        "cache": {"block_size": 16, "num_blocks": 12},
    }
    with Pipeline(config) as pipeline:
        yield pipeline


def test_an_overflow_ends_its_own_request_and_changes_no_other(engine: Pipeline) -> None:
    client = engine.client
    clean = [[*BEGINNING, 11, 12, 13], [3, 4, 5], BEGINNING[:20], [50] * 30]
    expected = [client.generate(prompt, PARAMS).token_ids for prompt in clean]
    bad = [
        [*BEGINNING, OVERFLOWING, 5, 6],
        [OVERFLOWING],
        [OVERFLOWING, *BEGINNING],
        BEGINNING[:20] + [OVERFLOWING] * 20,
    ]
    client.clear_cache()
    for prompt in bad:
        with pytest.raises(LogitsNotFinite, match="not finite"):
            client.generate(prompt, PARAMS)
    assert [client.generate(prompt, PARAMS).token_ids for prompt in clean] == expected

    mixed = [prompt for pair in zip(bad, clean, strict=True) for prompt in pair] * 3
    outputs = client.generate_batch(mixed, PARAMS)
    assert [output.token_ids for output in outputs[1::2]] == expected * 3
    assert {output.finish_reason for output in outputs[::2]} == {"error"}
    assert client.stats()["scheduler"]["num_not_finite"] == 4 + 12


def test_of_several_samples_all_end_with_the_error_of_one(engine: Pipeline) -> None:
    params = SamplingParams(max_tokens=8, n=3, temperature=1.0, seed=1)
    with pytest.raises(LogitsNotFinite):
        engine.client.generate([5, OVERFLOWING, 6], params)
    with pytest.raises(LogitsNotFinite):
        list(engine.client.generate([5, OVERFLOWING, 6], params, stream=True))
    assert len(engine.client.generate([5, 6], params).completions) == 3
