"""Tables and a batch to sample from, and what filters keep by the textbook."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from ipc.records import MAX_END_IDS, FinishCode, SamplerVariant, StepShape, result_layout
from workers.gpu.batch import StepBatch
from workers.gpu.device.base import Device
from workers.gpu.device.cpu import CpuDevice
from workers.gpu.prepare import Prepare
from workers.gpu.records import views
from workers.gpu.sampling.sampler import race, sample
from workers.gpu.tables import RowTables

SHAPE = StepShape(max_num_seqs=256, max_num_batched_tokens=32, max_model_len=64, block_size=4)
VOCAB = 50


class Bench:
    """Tables and a batch in which sequence i is row i, `length` tokens long, without filters or noise."""

    def __init__(self, num_seqs: int, length: int = 10, device: Device[Any, Any] | None = None) -> None:
        device = device or CpuDevice()
        self.tables = RowTables(device, SHAPE, num_blocks=8)
        self.tables.top_p.fill_(1.0)
        self.tables.max_len.fill_(SHAPE.max_model_len)
        self.tables.end_ids.fill_(-1)
        self.batch: StepBatch = Prepare(device, self.tables, None).batch(num_seqs, num_seqs)
        self.batch.seq_row.copy_(torch.arange(num_seqs))
        self.batch.seq_lens.fill_(length)
        self.flags = torch.ones(num_seqs, dtype=torch.int32, device=device.torch_device)
        layout = result_layout(SHAPE)
        self.outputs: Any = views(layout, device.zeros("result", (layout.num_bytes,), torch.uint8))

    def sample(
        self, logits: torch.Tensor, variant: SamplerVariant = SamplerVariant.FILTERED, want_logprobs: bool = False
    ) -> list[int]:
        sample(variant, want_logprobs, logits, self.batch, self.flags, self.tables, self.outputs)
        tokens: list[int] = self.outputs.token_ids[: self.batch.num_seqs].tolist()
        return tokens


def logits(num_seqs: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(num_seqs, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def check_ends(tokens_of: Callable[[Bench, torch.Tensor], list[int]]) -> None:
    """That each row ends at its own stop ids and length, and for which reason."""
    bench = Bench(4, length=10)
    bench.tables.end_ids[0, 0] = 7
    bench.tables.end_ids[1, MAX_END_IDS - 1] = 8
    bench.tables.max_len[2] = 11
    bench.tables.max_len[1] = 11  # both at once: a stop id is the reason
    bench.tables.max_len[3] = 12
    x = logits(4)
    x[:, 7] = 50
    x[1:, 8] = 51
    assert tokens_of(bench, x) == [7, 8, 8, 8]
    stop, length, running = int(FinishCode.STOP), int(FinishCode.LENGTH), int(FinishCode.RUNNING)
    assert bench.outputs.finish[:4].tolist() == [stop, stop, length, running]


def kept_by_sorting(scaled: torch.Tensor, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The textbook: sort, cut, renormalise, cut. One row; no two logits equal."""
    values, ids = scaled.double().sort(descending=True)
    if top_k:
        values, ids = values[:top_k], ids[:top_k]
    probabilities = values.softmax(-1)
    if top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        size = int((before < top_p).sum())
        values, ids, probabilities = values[:size], ids[:size], probabilities[:size]
    return set(ids[probabilities >= min_p * probabilities[0]].tolist())


def assert_same_tokens(tokens: list[int], bench: Bench, logits: torch.Tensor, *, filtered: bool) -> None:
    """That the tokens, of other arithmetic, are those that the CPU's sampler draws with this bench's columns.

    A token may be another if its score is the best but for 1e-5. Of all tokens at most one in a hundred is.
    """
    rows, position = bench.batch.seq_row.cpu(), bench.batch.seq_lens.cpu()
    tables = bench.tables
    columns = SimpleNamespace(**{
        name: getattr(tables, name).cpu() for name in ("temperature", "seed", "top_k", "top_p", "min_p")
    })  # fmt: skip
    scores = race(logits.cpu().float(), rows, position, columns, filtered=filtered)  # type: ignore[arg-type]
    best, expected = scores.max(-1)
    found = torch.tensor(tokens)
    assert bool((best - scores.gather(-1, found[:, None])[:, 0] <= 1e-5).all()), (tokens, expected.tolist())
    assert int((found != expected).sum()) * 100 <= len(tokens), (tokens, expected.tolist())
