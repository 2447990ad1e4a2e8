"""Compares the sampler with oracles: the effect of each parameter in a mixed batch, and the inputs of a draw."""

from __future__ import annotations

import pytest
import torch

from ipc.records import NO_TOKEN, SamplerVariant
from ipc.sampling_params import MAX_LOGPROBS
from tests.reference.sampler_bench import (
    SHAPE,
    VOCAB,
    Bench,
    check_ends,
    check_excluded,
    check_free_rows,
    check_not_finite,
    kept_by_sorting,
    logits,
)
from workers.gpu.sampling.filters import keep
from workers.gpu.sampling.random_bits import exponential, uniform

torch.set_num_threads(1)


def histogram(temperature: float, row: torch.Tensor, num_draws: int, **columns: float) -> torch.Tensor:
    """Frequencies [vocab] of `num_draws` draws from one row of logits, at different positions."""
    counts = torch.zeros(row.shape[0])
    bench = Bench(SHAPE.max_num_seqs)
    bench.tables.temperature.fill_(temperature)
    bench.tables.seed.copy_(torch.arange(SHAPE.max_num_seqs + 1) * 7919)
    for name, value in columns.items():
        getattr(bench.tables, name).fill_(value)
    batch_logits = row.expand(SHAPE.max_num_seqs, -1).contiguous()
    for i in range(-(-num_draws // SHAPE.max_num_seqs)):
        bench.batch.seq_lens.fill_(i + 1)
        counts += torch.bincount(torch.tensor(bench.sample(batch_logits)), minlength=row.shape[0])
    return counts / counts.sum()


def test_greedy_rows_of_a_mixed_batch_take_the_first_of_the_likeliest_tokens() -> None:
    bench = Bench(4)
    bench.tables.temperature[1::2] = 1.0
    bench.tables.top_k[:] = 5
    x = logits(4)
    x[0, [11, 30]] = 40.0
    x[2, [49, 3]] = 40.0
    for variant in SamplerVariant:
        tokens = bench.sample(x, variant)
        assert (tokens[0], tokens[2]) == (11, 3)


def test_filters_keep_what_sorting_keeps_for_every_combination_in_one_batch() -> None:
    ks, ps, ms = (0, 1, 3, 17, VOCAB, 1000), (1.0, 0.05, 0.5, 0.93), (0.0, 0.02, 0.3, 1.0)
    combinations = [(k, p, m) for k in ks for p in ps for m in ms]
    for seed in range(5):
        x = logits(len(combinations), seed)
        x -= x.amax(-1, keepdim=True)
        columns = zip(*combinations, strict=True)
        top_k, top_p, min_p = (torch.tensor(c, dtype=t) for c, t in zip(columns, (torch.int32, torch.float, torch.float), strict=True))  # fmt: skip # noqa: E501
        kept = keep(x, top_k, top_p, min_p)
        for i, (k, p, m) in enumerate(combinations):
            assert set(kept[i].nonzero()[:, 0].tolist()) == kept_by_sorting(x[i], k, p, m), (seed, k, p, m)


def test_tokens_equally_likely_stay_together() -> None:
    x = torch.tensor([[0.0, -1.0, -1.0, -1.0, -2.0, -0.0]])
    off = torch.tensor([1.0]), torch.tensor([0.0])
    assert keep(x, torch.tensor([1]), *off)[0].tolist() == [True, False, False, False, False, True]
    assert keep(x, torch.tensor([3]), *off)[0].tolist() == [True, True, True, True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_row_whose_logits_are_not_finite_ends_so_and_no_other_does(dtype: torch.dtype) -> None:
    check_not_finite(Bench, 57, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_ends_as_excluded_only_if_the_models_own_logits_are_fine(dtype: torch.dtype) -> None:
    check_excluded(Bench, 57, dtype)


def test_rows_without_adjustments_do_not_notice_adjusted_rows_beside_them() -> None:
    check_free_rows(Bench, 57, torch.bfloat16)


def test_temperature_shapes_the_distribution() -> None:
    row = torch.tensor([2.0, 1.0, 0.0, -1.0])
    for temperature in (0.5, 1.0, 3.0):
        found = histogram(temperature, row, 8000)
        assert (found - (row / temperature).softmax(-1)).abs().max() < 0.025, temperature
    assert histogram(1e-30, row, 80)[0] == 1.0


@pytest.mark.parametrize(
    ("column", "value", "left"), [("top_k", 2, [0, 1]), ("top_p", 0.7, [0, 1]), ("min_p", 0.2, [0, 1])]
)
def test_each_filter_leaves_the_others_out_and_their_odds_alone(column: str, value: float, left: list[int]) -> None:
    row = torch.tensor([2.0, 1.0, 0.0, -1.0])
    expected = torch.zeros(4)
    expected[left] = row[left].softmax(-1)
    assert (histogram(1.0, row, 6000, **{column: value}) - expected).abs().max() < 0.03


def test_a_draw_depends_on_seed_and_position_and_on_nothing_else() -> None:
    def draw(rows: list[int], seeds: list[int], positions: list[int], logits_of: list[int]) -> list[int]:
        bench = Bench(len(rows))
        bench.tables.temperature.fill_(1.5)
        bench.batch.seq_row.copy_(torch.tensor(rows))
        bench.batch.seq_lens.copy_(torch.tensor(positions))
        bench.tables.seed[rows] = torch.tensor(seeds)
        return bench.sample(logits(3)[logits_of], SamplerVariant.PLAIN)

    first = draw([0, 1, 2], [11, 2**62 + 5, 13], [4, 9, 30], [0, 1, 2])
    assert draw([5, 7, 3], [13, 11, 2**62 + 5], [30, 4, 9], [2, 0, 1]) == [first[2], first[0], first[1]]
    assert draw([6], [13], [30], [2]) == [first[2]]
    others = [draw([0, 1, 2], [11 + i, 12 + i, 13 + i], [4, 4, 4], [0, 0, 0]) for i in range(10)]
    assert len({token for tokens in others for token in tokens}) > 3
    moved = [draw([0], [11], [position], [0])[0] for position in range(1, 30)]
    assert len(set(moved)) > 3


def test_random_numbers_are_uniform_open_and_independent_along_every_axis() -> None:
    seeds, positions = torch.arange(64) % 8, torch.arange(64) // 8
    u = uniform(seeds, positions, 4096)
    assert float(u.min()) > 0
    assert float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 0.003
    assert abs(float(u.var()) - 1 / 12) < 0.002
    counts = torch.histc(u, 64, 0, 1)
    expected = u.numel() / 64
    assert float(((counts - expected) ** 2 / expected).sum()) < 130  # chi square with 63 degrees: p < 1e-6 beyond
    correlations = torch.corrcoef(u) - torch.eye(64)
    assert float(correlations.abs().max()) < 0.085  # 2,016 pairs at 1/64 each: 5.4 standard deviations
    lagged = torch.corrcoef(torch.stack((u[:, :-1].flatten(), u[:, 1:].flatten())))[0, 1]
    assert abs(float(lagged)) < 0.01


def test_exponential_noise_is_finite_and_above_zero() -> None:
    e = exponential(torch.arange(256), torch.zeros(256, dtype=torch.int64), 8192)
    assert bool(e.isfinite().all())
    assert float(e.min()) > 0
    assert abs(float(e.mean()) - 1) < 0.005


def test_a_row_ends_at_its_own_stop_ids_and_length() -> None:
    check_ends(lambda bench, x: bench.sample(x, SamplerVariant.GREEDY))


def test_a_token_is_written_where_the_next_step_reads_it_and_only_if_it_was_sampled() -> None:
    bench = Bench(3, length=10)
    bench.flags[1] = 0
    bench.batch.seq_row[2] = bench.tables.trash_row  # padding
    bench.batch.seq_lens[2] = 0
    x = logits(3)
    tokens = bench.sample(x, SamplerVariant.GREEDY)
    assert tokens == [int(x[0].argmax()), NO_TOKEN, NO_TOKEN]
    ids = bench.tables.token_ids.clone()
    assert int(ids[0, 10]) == tokens[0]
    ids[0, 10] = 0
    assert not ids[: bench.tables.trash_row].any(), "a token where none belongs"
    assert bench.tables.num_computed_tokens[:2].tolist() == [10, 10]
    assert int(bench.tables.num_computed_tokens[bench.tables.trash_row]) == 0
    assert bench.outputs.finish[:3].tolist() == [0, 0, 0]


def test_logprobs_are_the_models_own_before_temperature_and_filters() -> None:
    bench = Bench(2)
    bench.tables.temperature[:] = 5.0
    bench.tables.top_k[:] = 3
    x = logits(2)
    tokens = bench.sample(x, want_logprobs=True)
    expected = x.log_softmax(-1)
    top = expected.topk(MAX_LOGPROBS, -1)
    assert torch.allclose(bench.outputs.logprob[:2], expected[[0, 1], tokens])
    assert torch.equal(bench.outputs.top_ids[:2].long(), top.indices)
    assert torch.allclose(bench.outputs.top_logprobs[:2], top.values)


def test_logprobs_of_a_small_vocabulary_are_filled_up() -> None:
    bench = Bench(1)
    bench.sample(logits(1, vocab=6), SamplerVariant.GREEDY, want_logprobs=True)
    assert sorted(bench.outputs.top_ids[0, :6].tolist()) == list(range(6))
    assert bench.outputs.top_ids[0, 6:].tolist() == [NO_TOKEN] * (MAX_LOGPROBS - 6)
    assert bench.outputs.top_logprobs[0, 6:].tolist() == [-float("inf")] * (MAX_LOGPROBS - 6)
