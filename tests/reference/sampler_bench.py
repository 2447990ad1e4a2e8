"""Tables and a batch to sample from, and what filters keep by the textbook."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from ipc.records import MAX_END_IDS, NO_TOKEN, FinishCode, SamplerVariant, StepShape, result_layout, step_layout
from workers.gpu.device.base import Device
from workers.gpu.device.cpu import CpuDevice
from workers.gpu.execution.row_tables import RowTables
from workers.gpu.execution.step_batch import BatchBuffers
from workers.gpu.execution.tensor_views import ResultTensors, StepTensors, tensor_views
from workers.gpu.sampling.adjustments import adjust
from workers.gpu.sampling.logprobs import WantedLogprobs
from workers.gpu.sampling.sampler import race, sample

SHAPE = StepShape(max_num_seqs=256, max_num_batched_tokens=32, max_model_len=64, block_size=4)
VOCAB = 50


class Bench:
    """Tables and a batch in which sequence i is row i, `length` tokens long, without filters, adjustments or noise."""

    def __init__(
        self, num_seqs: int, length: int = 10, device: Device[Any, Any] | None = None, shape: StepShape = SHAPE
    ) -> None:
        device = device or CpuDevice()
        self.tables = RowTables(device, shape, num_blocks=8, vocab_size=VOCAB)
        batches = BatchBuffers(
            shape, lambda size: device.zeros("batch", (size,), torch.uint8), self.tables.block_table, {}
        )
        self.batch = batches.batch(num_seqs, num_seqs)
        self.batch.seq_row.copy_(torch.arange(num_seqs))
        self.batch.seq_lens.fill_(length)
        steps, layout = step_layout(shape), result_layout(shape)
        self.step = tensor_views(StepTensors, steps, device.zeros("step", (steps.num_bytes,), torch.uint8))
        self.step.seq_mask.fill_(-1)
        self.flags = self.step.seq_sample[:num_seqs]
        self.flags.fill_(1)
        self.masks = device.zeros("masks", (shape.max_num_seqs, shape.mask_words), torch.int32)
        self.outputs = tensor_views(ResultTensors, layout, device.zeros("result", (layout.num_bytes,), torch.uint8))

    def adjusted(self, logits: torch.Tensor) -> torch.Tensor:
        """The step's adjusted logits, as the stage in front of the sampler writes them."""
        out = torch.full(logits.shape, torch.nan, device=logits.device)
        self.adjust(logits, out)
        return out

    def adjust(self, logits: torch.Tensor, out: torch.Tensor) -> None:
        adjust(logits, self.batch, self.tables, self.step, self.masks, out)

    def sample(
        self, logits: torch.Tensor, variant: SamplerVariant = SamplerVariant.FILTERED, want_logprobs: bool = False
    ) -> list[int]:
        wanted = WantedLogprobs(want_logprobs)
        adjusted = self.adjusted(logits) if variant == SamplerVariant.ADJUSTED else None
        sample(variant, wanted, logits, self.batch, self.flags, self.tables, self.outputs, adjusted)
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


def check_not_finite(bench_of: Callable[[int], Bench], vocab_size: int, dtype: torch.dtype) -> None:
    """Check that exactly the rows whose logits hold NaN or +inf, or nothing finite, end as not finite, without a token.

    -inf beside finite logits is legal. A row's place, its parameters and its neighbours change nothing.
    """
    rows = torch.zeros(10, vocab_size, dtype=dtype)
    rows[0, vocab_size // 2] = torch.nan
    rows[1] = torch.nan
    rows[2, -1] = torch.inf
    rows[3] = -torch.inf
    rows[4, 0], rows[4, -1] = torch.nan, torch.inf
    rows[5] = -torch.inf
    rows[5, -1] = torch.nan
    rows[6] = -torch.inf
    rows[6, vocab_size // 3] = -7.0  # legal from here on
    rows[7, 1::2] = -torch.inf
    rows[8] = torch.finfo(dtype).min
    rows[9, 0] = torch.finfo(dtype).max
    is_finite = [False] * 6 + [True] * 4
    for variant in SamplerVariant:
        for temperature, top_k, top_p, min_p in (
            (0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (1.0, 2, 0.9, 0.0), (1.0, 0, 0.3, 0.5), (1e-3, 7, 1.0, 0.0),
        ):  # fmt: skip
            bench = bench_of(10)
            bench.tables.temperature.fill_(temperature)
            bench.tables.top_k.fill_(top_k)
            bench.tables.top_p.fill_(top_p)
            bench.tables.min_p.fill_(min_p)
            bench.flags[7] = 0  # computes a prompt: its logits mean nothing
            tokens = bench.sample(rows.to(bench.batch.seq_row.device), variant)
            assert [token != NO_TOKEN for token in tokens] == [*is_finite[:7], False, *is_finite[8:]], (variant, tokens)
            finish = bench.outputs.finish[:10].tolist()
            assert [code == FinishCode.NOT_FINITE for code in finish] == [not finite for finite in is_finite]
            assert tokens[6] == vocab_size // 3
            assert all(0 <= token < vocab_size for token, finite in zip(tokens, is_finite, strict=True) if finite and token != NO_TOKEN)  # fmt: skip # noqa: E501
            next_ids = bench.tables.token_ids[bench.batch.seq_row.long(), bench.batch.seq_lens.long()].tolist()
            assert all(0 <= token < vocab_size for token in next_ids), "the next step may still compute these rows"


def check_excluded(bench_of: Callable[[int], Bench], vocab_size: int, dtype: torch.dtype) -> None:
    """Check which rows end as excluded: those whose mask is closed although the model's own logits are fine."""
    rows = torch.randn(6, vocab_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows[2] = rows[3] = -torch.inf
    rows[4, 0], rows[5, -1] = torch.nan, torch.inf
    for temperature in (0.0, 1.0):
        bench = bench_of(6)
        bench.tables.temperature.fill_(temperature)
        bench.step.seq_mask[[1, 3, 4, 5]] = 0  # a closed mask; rows 0 and 2 have none
        tokens = bench.sample(rows.to(bench.batch.seq_row.device), SamplerVariant.ADJUSTED)
        not_finite = [FinishCode.NOT_FINITE] * 4
        assert bench.outputs.finish[:6].tolist() == [FinishCode.RUNNING, FinishCode.EXCLUDED, *not_finite]
        assert [token == NO_TOKEN for token in tokens] == [False] + [True] * 5


def check_free_rows(bench_of: Callable[[int], Bench], vocab_size: int, dtype: torch.dtype) -> None:
    """Check that rows without adjustments draw the same tokens in steps with and without adjusted logits."""
    bench, num_free = bench_of(40), 39
    tables, device = bench.tables, bench.batch.seq_row.device
    every_row = torch.arange(len(tables.seed), device=device)
    tables.seed.copy_(every_row)
    tables.temperature.copy_(every_row % 3 * 0.7)
    tables.top_k.copy_(every_row % 4 * 3)
    tables.top_p.copy_(1 - every_row % 5 * 0.1)
    bench.step.seq_mask[num_free] = 0
    bench.masks[0, 0] = 1 << 4  # of the row that is not free: only token 4
    x = torch.randn(40, vocab_size, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
    without = bench.sample(x, SamplerVariant.FILTERED)
    beside = bench.sample(x, SamplerVariant.ADJUSTED)
    assert beside[:num_free] == without[:num_free]
    assert beside[num_free] == 4


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

    A token may differ if its score is within 1e-5 of the best. At most one token in a hundred may differ.
    """
    rows, position = bench.batch.seq_row.cpu(), bench.batch.seq_lens.cpu()
    tables = bench.tables
    columns = SimpleNamespace(**{
        name: getattr(tables, name).cpu() for name in ("temperature", "seed", "top_k", "top_p", "min_p")
    })  # fmt: skip
    found_logits = logits.cpu().float()
    scores = race(found_logits, found_logits.amax(-1), rows, position, columns, filtered=filtered)  # type: ignore[arg-type]
    best, expected = scores.max(-1)
    found = torch.tensor(tokens)
    assert bool((best - scores.gather(-1, found[:, None])[:, 0] <= 1e-5).all()), (tokens, expected.tolist())
    assert int((found != expected).sum()) * 100 <= len(tokens), (tokens, expected.tolist())
