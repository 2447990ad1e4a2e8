"""The sampler's kernels on a GPU against the CPU's sampler: at real vocabularies, and under capture and replay."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ipc.records import NO_TOKEN, SamplerVariant
from tests.reference.sampler_bench import (
    SHAPE,
    Bench,
    assert_same_tokens,
    check_excluded,
    check_free_rows,
    check_not_finite,
)
from workers.gpu.sampling.logprobs import WantedLogprobs
from workers.gpu.sampling.sampler import sample

pytestmark = pytest.mark.gpu

VOCAB = 128_256
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FILTERS = [(k, p, m) for k in (0, 1, 20, 50, 1000, VOCAB) for p in (1.0, 0.1, 0.9) for m in (0.0, 0.05)]


@pytest.fixture(scope="module")
def device() -> Any:
    from workers.gpu.device.cuda import CudaDevice

    return CudaDevice()


def random_logits(num_seqs: int, vocab_size: int, seed: int, dtype: torch.dtype, scale: float = 2.5) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(num_seqs, vocab_size, generator=generator, device="cuda") * scale).to(dtype)


def random_bench(num_seqs: int, device: Any, seed: int = 0) -> Bench:
    """Rows of every combination of filters, every fifth of them greedy."""
    bench = Bench(num_seqs, device=device)
    random = torch.Generator().manual_seed(seed)
    tables, count = bench.tables, SHAPE.max_num_seqs
    top_k, top_p, min_p = zip(*(FILTERS[i % len(FILTERS)] for i in range(count)), strict=True)
    tables.top_k[:count] = torch.tensor(top_k, dtype=torch.int32).cuda()
    tables.top_p[:count] = torch.tensor(top_p).cuda()
    tables.min_p[:count] = torch.tensor(min_p).cuda()
    tables.temperature[:count] = torch.tensor([1.0, 0.7, 1.0, 0.0, 1.5]).repeat(count)[:count].cuda()
    tables.seed[:count] = torch.randint(2**63 - 1, (count,), generator=random).cuda()
    bench.batch.seq_row.copy_(torch.randperm(count, generator=random)[:num_seqs])
    bench.batch.seq_lens.copy_(torch.randint(1, SHAPE.max_model_len, (num_seqs,), generator=random))
    return bench


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [99, 32_000, 50_257, VOCAB, 262_144])
@pytest.mark.parametrize("num_seqs", [1, 256])
def test_the_greedy_token_is_the_first_of_the_largest(
    num_seqs: int, vocab_size: int, dtype: torch.dtype, device: Any
) -> None:
    """In half precision many logits are equal; torch on the CPU says which of them comes first."""
    logits = random_logits(num_seqs, vocab_size, vocab_size, dtype)
    assert Bench(num_seqs, device=device).sample(logits, SamplerVariant.GREEDY) == logits.cpu().argmax(-1).tolist()


@pytest.mark.parametrize("scale", [0.1, 2.5], ids=["flat", "peaked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_seqs", [1, 5, 32])
@pytest.mark.parametrize("variant", [SamplerVariant.PLAIN, SamplerVariant.FILTERED], ids=str)
def test_a_mixed_batch_draws_what_the_cpu_draws(
    variant: SamplerVariant, num_seqs: int, dtype: torch.dtype, scale: float, device: Any
) -> None:
    bench = random_bench(num_seqs, device, seed=num_seqs)
    logits = random_logits(num_seqs, VOCAB, num_seqs, dtype, scale)
    assert_same_tokens(bench.sample(logits, variant), bench, logits, filtered=variant >= SamplerVariant.FILTERED)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_whose_logits_are_not_finite_ends_so_and_no_other_does(dtype: torch.dtype, device: Any) -> None:
    check_not_finite(lambda num_seqs: Bench(num_seqs, device=device), VOCAB, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_rows_with_a_closed_mask_are_excluded_and_other_rows_do_not_notice(
    dtype: torch.dtype, device: Any
) -> None:
    check_excluded(lambda num_seqs: Bench(num_seqs, device=device), VOCAB, dtype)
    check_free_rows(lambda num_seqs: Bench(num_seqs, device=device), VOCAB, dtype)


@pytest.mark.parametrize("variant", SamplerVariant, ids=str)
def test_every_effect_is_the_cpus_and_logprobs_are_of_the_tokens(variant: SamplerVariant, device: Any) -> None:
    """With sequences that are not sampled, and padding: several sequences of the trash row."""
    logits = random_logits(32, 40, 7, torch.float32)
    benches = [Bench(32, device=device), Bench(32)]
    for bench in benches:
        trash = bench.tables.trash_row
        bench.tables.temperature[:trash] = 1.0
        bench.tables.top_k[:trash] = 6
        bench.tables.seed.copy_(torch.arange(trash + 1))
        bench.tables.end_ids[:, 3] = torch.arange(trash + 1) % 6
        bench.tables.max_len.copy_(torch.arange(trash + 1) % 20)
        bench.flags[::3] = 0
        bench.batch.seq_row[25:] = trash
        bench.batch.seq_lens[25:] = 0
    ours, cpus = benches
    assert ours.sample(logits, variant, want_logprobs=True) == cpus.sample(logits.cpu(), variant, want_logprobs=True)
    assert torch.equal(ours.tables.columns.cpu(), cpus.tables.columns)
    assert torch.equal(ours.tables.token_ids[:-1].cpu(), cpus.tables.token_ids[:-1])
    assert torch.equal(ours.outputs.finish.cpu(), cpus.outputs.finish)
    assert ours.outputs.token_ids[25:32].tolist() == [NO_TOKEN] * 7
    torch.testing.assert_close(ours.outputs.logprob[:25].cpu(), cpus.outputs.logprob[:25])
    torch.testing.assert_close(ours.outputs.top_logprobs.cpu(), cpus.outputs.top_logprobs)


@pytest.mark.parametrize("variant", SamplerVariant, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_captured_sampler_draws_anew_at_every_replay(
    dtype: torch.dtype, variant: SamplerVariant, device: Any
) -> None:
    bench = random_bench(5, device)
    logits = torch.zeros(5, VOCAB, device="cuda", dtype=dtype)
    adjusted = torch.zeros(5, VOCAB, device="cuda") if variant == SamplerVariant.ADJUSTED else None

    def work() -> None:
        if adjusted is not None:
            bench.adjust(logits, adjusted)
        sample(variant, WantedLogprobs.NONE, logits, bench.batch, bench.flags, bench.tables, bench.outputs, adjusted)

    captured = device.capture(work)
    device.settle()  # values that were set on another stream
    with torch.cuda.stream(device.stream("compute")):
        captured()  # as it is, and captured
        for seed in range(4):
            logits.copy_(random_logits(5, VOCAB, seed, dtype))
            bench.batch.seq_lens.fill_(seed + 1)
            captured()
            tokens = bench.outputs.token_ids[:5].tolist()
            if variant == SamplerVariant.GREEDY:
                assert tokens == logits.cpu().argmax(-1).tolist()
            else:
                assert_same_tokens(tokens, bench, logits, filtered=variant >= SamplerVariant.FILTERED)


def test_the_kernels_take_little_memory_and_logprobs_no_more_than_is_reserved_for_them(device: Any) -> None:
    from workers.gpu.memory.account import SAMPLER_BYTES

    bench, logits = random_bench(256, device), random_logits(256, VOCAB, 0, torch.bfloat16)
    adjusted = torch.zeros(256, VOCAB, device="cuda")
    bench.adjust(logits, adjusted)
    for wanted, bytes_per_logit in ((WantedLogprobs.NONE, 0.1), (WantedLogprobs.RAW, SAMPLER_BYTES)):
        for variant in SamplerVariant:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            source = adjusted if variant == SamplerVariant.ADJUSTED else None
            sample(variant, wanted, logits, bench.batch, bench.flags, bench.tables, bench.outputs, source)
            assert torch.cuda.max_memory_allocated() - before <= bytes_per_logit * logits.numel()
