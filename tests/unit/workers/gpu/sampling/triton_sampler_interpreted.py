"""The sampler's Triton kernels against the CPU's sampler, under Triton's interpreter. Run by test_triton_kernels.py."""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from ipc.records import NO_TOKEN, FinishCode, SamplerVariant
from tests.reference.sampler_bench import (
    SHAPE,
    Bench,
    assert_same_tokens,
    check_ends,
    check_excluded,
    check_free_rows,
    check_not_finite,
    kept_by_sorting,
)
from tests.reference.triton_interpreter import let_scalars_end_ranges
from workers.gpu.sampling.random_bits import exponential, uniform
from workers.gpu.sampling.triton_random import exponential as triton_exponential
from workers.gpu.sampling.triton_random import exponential_of as triton_exponential_of
from workers.gpu.sampling.triton_random import random_key
from workers.gpu.sampling.triton_random import uniform as triton_uniform
from workers.gpu.sampling.triton_sampler import sample

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)  # imported for its effect: unwritten memory holds NaN
let_scalars_end_ranges()

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FILTERS = [(k, p, m) for k in (0, 1, 3, 40, 10_000) for p in (1.0, 0.05, 0.93) for m in (0.0, 0.1)]
Filters = tuple[int, float, float]  # top_k, top_p, min_p


def tokens_of(bench: Bench, logits: torch.Tensor, variant: SamplerVariant) -> list[int]:
    """Every row's token, and the bench as the kernels leave it."""
    adjusted = bench.adjusted(logits) if variant == SamplerVariant.ADJUSTED else None
    tokens = sample(variant, logits, bench.batch, bench.flags, bench.tables, bench.outputs, adjusted)
    assert tokens.dtype == torch.int64
    listed: list[int] = tokens.tolist()
    return listed


def random_logits(num_seqs: int, vocab_size: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """With other data between the rows."""
    x = torch.randn(num_seqs, vocab_size + 3, generator=torch.Generator().manual_seed(seed)) * 3
    x[:, vocab_size:] = 1e4
    return x.to(dtype)[:, :vocab_size]


def random_bench(num_seqs: int, seed: int) -> Bench:
    """Sequences in rows other than their place, some greedy, with different seeds and lengths."""
    random = torch.Generator().manual_seed(seed)
    bench = Bench(num_seqs)
    bench.batch.seq_row.copy_(torch.randperm(SHAPE.max_num_seqs, generator=random)[:num_seqs])
    bench.batch.seq_lens.copy_(torch.randint(1, SHAPE.max_model_len, (num_seqs,), generator=random))
    temperatures = torch.tensor([0.0, 0.3, 1.0, 1.0, 3.0])
    bench.tables.temperature.copy_(temperatures[torch.randint(5, (SHAPE.max_num_seqs + 1,), generator=random)])
    bench.tables.seed.copy_(torch.randint(2**63 - 1, (SHAPE.max_num_seqs + 1,), generator=random))
    return bench


def set_filters(bench: Bench, filters: list[Filters]) -> None:
    rows = bench.batch.seq_row.long()
    top_k, top_p, min_p = zip(*filters, strict=True)
    bench.tables.top_k[rows] = torch.tensor(top_k, dtype=torch.int32)
    bench.tables.top_p[rows] = torch.tensor(top_p)
    bench.tables.min_p[rows] = torch.tensor(min_p)


def assert_left(row: torch.Tensor, tokens: list[int], left_by: list[tuple[Filters, set[int]]]) -> None:
    """Check that filters keep exactly the given ones of `tokens`. Each token gets a draw that it wins without
    filters."""
    draws = Bench(SHAPE.max_num_seqs)
    draws.tables.temperature.fill_(1.0)
    draws.tables.seed.copy_(torch.arange(SHAPE.max_num_seqs + 1))
    winners = draws.sample(row.float().expand(SHAPE.max_num_seqs, -1), SamplerVariant.PLAIN)
    seeds = torch.tensor([winners.index(token) for token in tokens])

    bench = Bench(len(tokens) * len(left_by))
    bench.tables.temperature.fill_(1.0)
    bench.tables.seed[: bench.batch.num_seqs] = seeds.repeat(len(left_by))
    set_filters(bench, [filters for filters, _ in left_by for _ in tokens])
    found = tokens_of(bench, row.expand(bench.batch.num_seqs, -1), SamplerVariant.FILTERED)
    for i, (filters, left) in enumerate(left_by):
        for winner, token in zip(tokens, found[i * len(tokens) :], strict=False):
            assert token == winner if winner in left else token in left, (filters, winner, token)


@triton.jit
def _draw(uniforms, exponentials, seeds, positions, num_draws, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    key = random_key(tl.load(seeds + row), tl.load(positions + row))
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, mask = row * num_draws + index, index < num_draws
    tl.store(uniforms + at, triton_uniform(key, index), mask=mask)
    tl.store(exponentials + at, triton_exponential(key, index), mask=mask)


@triton.jit
def _exponential_of(result, u, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(result + index, triton_exponential_of(tl.load(u + index)))


def test_uniforms_are_those_of_random_bits_bit_for_bit_and_the_noise_nearly() -> None:
    seeds = torch.tensor([0, 1, 2**32 + 7, 2**62 + 5, 2**63 - 1])
    positions = torch.tensor([0, 1, 131_071, 77, 2**31 - 1], dtype=torch.int32)
    num_draws = 150_000
    uniforms, exponentials = torch.empty(2, 5, num_draws)
    _draw[(5, triton.cdiv(num_draws, 65_536))](uniforms, exponentials, seeds, positions, num_draws, BLOCK=65_536)
    assert torch.equal(uniforms, uniform(seeds, positions.long(), num_draws))
    expected = exponential(seeds, positions.long(), num_draws)
    assert float(((exponentials - expected) / expected).abs().max()) < 6e-7


def test_the_noise_is_exact_to_5e_7_from_the_least_uniform_to_the_largest() -> None:
    least = torch.arange(1 << 14, dtype=torch.float32).add(0.5).mul(2.0**-31)
    between = torch.logspace(-9, 0, 3 << 14).clamp(2.0**-32, 1 - 2.0**-24)
    u = torch.cat((least, between))
    result = torch.empty_like(u)
    _exponential_of[(4,)](result, u, BLOCK=1 << 14)
    expected = -torch.log1p(-u.double())
    assert float(((result - expected) / expected).abs().max()) < 5e-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 50, 1024, 1025, 4097, 20_001])
def test_the_greedy_token_is_torchs_argmax_however_a_row_is_cut(vocab_size: int, dtype: torch.dtype) -> None:
    """In half precision many elements are equal."""
    for num_seqs in (1, 3):
        x = random_logits(num_seqs, vocab_size, 1, dtype)
        assert tokens_of(Bench(num_seqs), x, SamplerVariant.GREEDY) == x.argmax(-1).tolist()


@pytest.mark.parametrize("places", [(0, 1), (7, 1023), (1023, 1024), (3, 9999), (4096, 8192, 9999)], ids=str)
def test_the_greedy_token_is_the_first_of_equals_within_a_part_and_across_parts(places: tuple[int, ...]) -> None:
    x = torch.zeros(2, 10_000)
    x[1, list(places)] = 3.0
    for variant in SamplerVariant:
        bench = Bench(2)
        bench.tables.top_k.fill_(5)
        bench.tables.top_p.fill_(0.5)
        assert tokens_of(bench, x, variant) == [0, places[0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [50, 5000])
def test_a_mixed_batch_without_filters_draws_what_the_cpu_draws(vocab_size: int, dtype: torch.dtype) -> None:
    bench, x = random_bench(32, vocab_size), random_logits(32, vocab_size, 2, dtype)
    tokens = tokens_of(bench, x, SamplerVariant.PLAIN)
    assert_same_tokens(tokens, bench, x, filtered=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [50, 5000])
def test_filters_in_every_combination_draw_what_the_cpu_draws(vocab_size: int, dtype: torch.dtype) -> None:
    """In half precision many logits are equal, and stay together."""
    bench, x = random_bench(len(FILTERS), 3), random_logits(len(FILTERS), vocab_size, 4, dtype)
    set_filters(bench, FILTERS)
    tokens = tokens_of(bench, x, SamplerVariant.FILTERED)
    assert_same_tokens(tokens, bench, x, filtered=True)


def test_a_filtered_token_is_always_one_that_sorting_keeps() -> None:
    bench, x = random_bench(len(FILTERS), 1), random_logits(len(FILTERS), 3000, 1)
    bench.tables.temperature.fill_(2.5)  # flat enough for most filters to leave many
    set_filters(bench, FILTERS)
    tokens = tokens_of(bench, x, SamplerVariant.FILTERED)
    for row, token, filters in zip(x, tokens, FILTERS, strict=True):
        assert token in kept_by_sorting(row.double() / 2.5, *filters), filters


def test_small_rows_of_few_values_draw_what_the_cpu_draws() -> None:
    """Ties at every threshold, filters of every strength, vocabularies of several small sizes."""
    random = torch.Generator().manual_seed(11)
    for vocab_size in (1, 2, 3, 8, 33):
        num_seqs = 20
        bench = random_bench(num_seqs, vocab_size)
        x = torch.randint(-3, 4, (num_seqs, vocab_size), generator=random).bfloat16() * 0.7
        top_k = torch.randint(0, vocab_size + 2, (num_seqs,), generator=random)
        top_p = (torch.rand(num_seqs, generator=random) * 1.3).clamp(0.01, 1.0)
        min_p = (torch.rand(num_seqs, generator=random) * 1.3 - 0.2).clamp(0.0, 1.0)
        set_filters(bench, list(zip(top_k.tolist(), top_p.tolist(), min_p.tolist(), strict=True)))
        assert_same_tokens(tokens_of(bench, x, SamplerVariant.FILTERED), bench, x, filtered=True)


def test_tokens_equally_likely_stay_together() -> None:
    row = torch.full((3000,), -8.0, dtype=torch.bfloat16)
    best, second = [10, 2000], [5, 1500, 2999]
    row[best], row[second] = 1.0, 0.0
    five = {*best, *second}
    left_by = [
        ((1, 1.0, 0.0), set(best)),
        ((3, 1.0, 0.0), five),
        ((0, 0.01, 0.0), set(best)),
        ((0, 1.0, 1.0), set(best)),
        ((4, 0.85, 0.0), five),
        ((4, 0.6, 0.0), set(best)),
    ]
    assert_left(row, sorted(five), left_by)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neighbours_of_a_dtype_are_told_apart(dtype: torch.dtype) -> None:
    step = torch.finfo(dtype).eps
    for row in ([1.0, 1 + step, 1 + 2 * step], [-1 - 2 * step, -1 - step, -1.0]):
        left_by = [((k, p, 0.0), set(range(3 - k, 3))) for k in (1, 2, 3) for p in (1.0, 0.99)]
        assert_left(torch.tensor(row, dtype=dtype), [0, 1, 2], left_by)


def test_a_token_just_inside_a_filter_is_kept_and_one_just_outside_is_not() -> None:
    odds = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05])
    left_by: list[tuple[Filters, set[int]]] = []
    for n in (1, 3, 5):
        left = set(range(n))
        up_to, before = float(odds[:n].sum()), float(odds[: n - 1].sum())
        left_by += [((n, 1.0, 0.0), left), ((0, 1.0, float(odds[n - 1] / odds[0]) - 0.01), left)]
        left_by += [((0, p, 0.0), left) for p in (up_to - 0.01, before + 0.01)]
        left_by += [
            ((4, p / 0.95, 0.0), left) for p in (up_to - 0.01, before + 0.01) if n < 5
        ]  # of 0.95 that top_k left
    assert_left(odds.log(), [0, 1, 2, 3, 4], left_by)


class KernelBench(Bench):
    """A bench that samples by the kernels."""

    def sample(
        self, logits: torch.Tensor, variant: SamplerVariant = SamplerVariant.FILTERED, want_logprobs: bool = False
    ) -> list[int]:
        tokens_of(self, logits, variant)
        found: list[int] = self.outputs.token_ids[: self.batch.num_seqs].tolist()
        return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [7, 2500])
def test_a_row_whose_logits_are_not_finite_ends_so_and_no_other_does(vocab_size: int, dtype: torch.dtype) -> None:
    check_not_finite(KernelBench, vocab_size, dtype)


def test_a_row_ends_as_excluded_only_if_the_models_own_logits_are_fine() -> None:
    check_excluded(KernelBench, 2500, torch.bfloat16)


def test_rows_without_adjustments_do_not_notice_adjusted_rows_beside_them() -> None:
    check_free_rows(KernelBench, 2500, torch.bfloat16)


def test_extreme_finite_logits_are_drawn_from_like_others() -> None:
    x = torch.full((3, 2500), -torch.inf)
    x[0, 2321] = -1e30
    x[1] = torch.linspace(-1e38, 2e38, 2500)
    x[2, 1234], x[2, 1235] = 3e38, -3e38
    filters = [(0, 1.0, 0.0), (2, 1.0, 0.0), (0, 0.9, 0.0), (7, 0.9, 0.1)]
    temperatures = torch.tensor([0.0, 1.0, 1e-30])
    for variant in SamplerVariant:
        used = filters if variant == SamplerVariant.FILTERED else filters[:1]
        bench = Bench(3 * 3 * len(used))
        set_filters(bench, [some for some in used for _ in range(3 * 3)])
        bench.tables.temperature[: bench.batch.num_seqs] = temperatures.repeat_interleave(3).repeat(len(used))
        found = torch.tensor(tokens_of(bench, x.repeat(3 * len(used), 1), variant)).view(-1, 3)
        assert (found == torch.tensor([2321, 2499, 1234])).all()


@pytest.mark.parametrize("variant", SamplerVariant, ids=str)
def test_a_row_ends_at_its_own_stop_ids_and_length(variant: SamplerVariant) -> None:
    check_ends(lambda bench, x: tokens_of(bench, x, variant))


@pytest.mark.parametrize("variant", SamplerVariant, ids=str)
def test_every_effect_on_tables_and_results_is_the_cpus(variant: SamplerVariant) -> None:
    """With sequences that are not sampled, and padding: several sequences of the trash row."""
    num_seqs, vocab_size = 48, 12
    x = random_logits(num_seqs, vocab_size, 5)
    benches = [random_bench(num_seqs, 6), random_bench(num_seqs, 6)]
    for bench in benches:
        tables, trash = bench.tables, bench.tables.trash_row
        tables.temperature[trash] = 0.0
        tables.top_k.copy_(torch.arange(SHAPE.max_num_seqs + 1) % 5)
        tables.end_ids[:, 3] = torch.arange(SHAPE.max_num_seqs + 1) % vocab_size
        tables.max_len.copy_(torch.arange(SHAPE.max_num_seqs + 1) % SHAPE.max_model_len)
        tables.num_computed_tokens[:trash] = 5
        tables.token_ids[:trash] = 77
        bench.flags[::3] = 0
        bench.batch.seq_row[40:] = trash
        bench.batch.seq_lens[40:] = 0
        bench.outputs.token_ids.fill_(-5)
        bench.outputs.finish.fill_(-5)
    ours, cpus = benches
    tokens = tokens_of(ours, x, variant)
    assert all(0 <= token < vocab_size for token in tokens)
    cpus.sample(x, variant)
    assert torch.equal(ours.tables.columns, cpus.tables.columns)
    trash = ours.tables.trash_row
    assert int(ours.tables.num_computed_tokens[trash]) == 0
    assert torch.equal(ours.tables.token_ids[:trash], cpus.tables.token_ids[:trash])
    assert (cpus.tables.token_ids[:trash] != 77).sum() == 26, "tokens of this test"
    assert torch.equal(ours.outputs.token_ids, cpus.outputs.token_ids)
    assert torch.equal(ours.outputs.finish, cpus.outputs.finish)
    assert ours.outputs.token_ids[40:48].tolist() == [NO_TOKEN] * 8
    assert set(cpus.outputs.finish[:40].tolist()) == {FinishCode.RUNNING, FinishCode.STOP, FinishCode.LENGTH}
