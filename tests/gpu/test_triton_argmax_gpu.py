"""The greedy sampler's argmax on a GPU: of real vocabularies, and under capture and replay."""

from __future__ import annotations

import pytest
import torch

from workers.gpu.sampler import likeliest

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("vocab_size", [99, 32_000, 50_257, 128_256, 262_144])
@pytest.mark.parametrize("num_rows", [1, 32, 512])
def test_argmax_takes_the_first_of_the_largest(num_rows: int, vocab_size: int, dtype: torch.dtype) -> None:
    """In half precision many elements are equal; torch on the CPU says which of them comes first."""
    generator = torch.Generator("cuda").manual_seed(vocab_size)
    logits = torch.randn(num_rows, vocab_size, generator=generator, device="cuda").to(dtype)
    assert torch.equal(likeliest(logits).cpu(), logits.cpu().argmax(-1))


def test_argmax_of_what_is_not_finite_still_lies_in_the_row() -> None:
    logits = torch.full((3, 128_256), torch.nan, device="cuda")
    logits[1] = -torch.inf
    logits[2, 100_000] = 0.0
    assert likeliest(logits).tolist() == [0, 0, 100_000]


def test_argmax_can_be_captured() -> None:
    logits = torch.zeros(4, 128_256, device="cuda", dtype=torch.bfloat16)
    likeliest(logits)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = likeliest(logits)
    for seed in range(3):
        logits.normal_(generator=torch.Generator("cuda").manual_seed(seed))
        graph.replay()
        assert torch.equal(tokens.cpu(), logits.cpu().argmax(-1))
