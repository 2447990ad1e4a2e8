"""The attention kernels against plain torch, under Triton's interpreter. Run by test_triton_kernels.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.reference.paged_attention import PLANTS, PagedStep, attend, check_planted, make_paged_step, run_backend
from tests.reference.triton_interpreter import convert_e4m3_as_gpus_do, let_scalars_end_ranges
from workers.gpu.attention.triton_backend import TritonBackend
from workers.gpu.attention.triton_kv_write import write_kv
from workers.gpu.memory.kv_cache import quantize

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)  # imported for its effect: unwritten memory holds NaN
TOLERANCE = 1e-5
SCALES = (0.02, 3.0)  # of a cache of 8 bits: K of a normal distribution fills the format's range, V does not
let_scalars_end_ranges()
convert_e4m3_as_gpus_do()


def run(step: PagedStep, *, scaling: float = 0.25, **options: Any) -> torch.Tensor:
    return run_backend(TritonBackend(), step, scaling=scaling, **options)


def assert_equal(result: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert result.isfinite().all()
    torch.testing.assert_close(result.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("block_size", [4, 16, 32])
@pytest.mark.parametrize(
    "lengths",
    [
        [1],
        [130],
        [3, 40, 16, 33, 1],
        [64, 64, 64],
        [200, 2, 1, 47],
    ],
    ids=str,
)
def test_decodes_are_right_wherever_the_programs_parts_cut_them(lengths: list[int], block_size: int) -> None:
    step = make_paged_step([(1, length) for length in lengths], block_size=block_size)
    assert_equal(run(step), attend(step, scaling=0.25))


@pytest.mark.parametrize("block_size", [4, 16, 32])
@pytest.mark.parametrize(
    "lengths",
    [
        [(2, 2)],
        [(33, 33)],
        [(16, 40)],
        [(5, 5), (1, 20), (7, 31), (1, 1), (18, 50)],
        [(1, 35), (1, 64), (20, 20)],
    ],
    ids=str,
)
def test_mixed_steps_are_right(lengths: list[tuple[int, int]], block_size: int) -> None:
    step = make_paged_step(lengths, block_size=block_size)
    assert_equal(run(step), attend(step, scaling=0.25))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8])
def test_any_number_of_query_heads_may_share_a_kv_head(group: int) -> None:
    step = make_paged_step([(1, 37), (7, 9), (1, 4)], num_heads=2 * group, num_kv_heads=2)
    assert_equal(run(step), attend(step, scaling=0.25))


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(80, 80), (96, 96), (128, 128), (256, 256), (24, 16)])
def test_head_sizes_need_not_be_powers_of_two_nor_equal(head_dim: int, head_dim_v: int) -> None:
    step = make_paged_step([(1, 37), (9, 19)], head_dim=head_dim, head_dim_v=head_dim_v)
    scaling = head_dim**-0.5
    assert_equal(run(step, scaling=scaling), attend(step, scaling=scaling))


@pytest.mark.parametrize("window", [1, 16, 17, 1000])
@pytest.mark.parametrize("lengths", [[(1, 1), (1, 50), (1, 17)], [(1, 50), (30, 45), (1, 2), (6, 6)]], ids=str)
def test_a_sliding_window_hides_what_is_older(lengths: list[tuple[int, int]], window: int) -> None:
    step = make_paged_step(lengths)
    assert_equal(run(step, sliding_window=window), attend(step, scaling=0.25, sliding_window=window))


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_a_soft_cap_bounds_the_scores(softcap: float) -> None:
    step = make_paged_step([(1, 70), (12, 33)])
    assert_equal(run(step, scaling=2.0, softcap=softcap), attend(step, scaling=2.0, softcap=softcap))


@pytest.mark.parametrize("lengths", [[(1, 70), (1, 1)], [(1, 70), (12, 33)]], ids=str)
def test_sinks_take_weight_once_however_a_sequence_is_split(lengths: list[tuple[int, int]]) -> None:
    step = make_paged_step(lengths)
    for sinks in (torch.tensor([0.0, 2.0, -3.0, 5.0]), torch.full((4,), 90.0)):
        assert_equal(run(step, sinks=sinks), attend(step, scaling=0.25, sinks=sinks))


def test_window_soft_cap_and_sinks_hold_together() -> None:
    step = make_paged_step([(1, 70), (12, 33), (1, 8)])
    options = {"sliding_window": 21, "softcap": 3.0, "sinks": torch.tensor([1.0, 2.0, -3.0, 0.5])}
    assert_equal(run(step, **options), attend(step, scaling=0.25, **options))


@pytest.mark.parametrize(
    ("lengths", "num_seqs", "num_tokens"),
    [
        ([(1, 30), (1, 5)], 8, 8),
        ([], 4, 4),
        ([(1, 30), (9, 12)], 8, 32),
        ([], 2, 16),
        ([(3, 9)], 1, 16),
    ],
    ids=str,
)
def test_padding_reads_nothing_and_gives_zeros(lengths: list[tuple[int, int]], num_seqs: int, num_tokens: int) -> None:
    step = make_paged_step(lengths, num_seqs=num_seqs, num_tokens=num_tokens)
    assert step.query.new_empty(1).isnan(), "this test has to see what is left unwritten"
    result = run(step)
    assert_equal(result, attend(step, scaling=0.25))
    assert not result[sum(tokens for tokens, _ in lengths) :].any()


@pytest.mark.parametrize("options", [{}, {"sliding_window": 9}, {"softcap": 2.0, "sinks": torch.ones(4)}], ids=str)
def test_what_is_not_finite_reaches_the_tokens_that_see_it_and_no_others(options: dict[str, Any]) -> None:
    for seed, plant_options in enumerate(PLANTS):
        step = make_paged_step([(1, 40), (21, 37), (1, 9), (5, 5), (18, 18)], num_seqs=6, num_tokens=50, seed=seed)
        found = check_planted(
            TritonBackend(), step, {**plant_options, "seed": seed}, TOLERANCE, scaling=0.25, **options
        )
        assert min(found) > 0, "a test needs tokens of both kinds"


def test_a_bucket_of_as_many_tokens_as_sequences_may_still_hold_sequences_of_several_tokens() -> None:
    step = make_paged_step([(1, 30), (4, 21), (1, 3)], num_seqs=8, num_tokens=8)
    assert_equal(run(step), attend(step, scaling=0.25))


def test_half_precision_is_summed_in_float32() -> None:
    """The interpreter has no products of bfloat16: those are left to the tests on a GPU."""
    step = make_paged_step([(1, 90), (9, 40)], dtype=torch.float16, head_dim=64)
    result = run(step, scaling=0.125)
    assert result.dtype == torch.float16
    assert_equal(result, attend(step, scaling=0.125), tolerance=1e-3)


def test_layers_of_a_step_share_its_plans_and_may_differ_in_window_and_query_strides() -> None:
    step = make_paged_step([(1, 70), (12, 33)])
    heads_first = dataclasses.replace(step, query=step.query.transpose(0, 1).contiguous().transpose(0, 1))
    attention = TritonBackend().begin_step(step.batch)
    for layer, window in ((step, None), (heads_first, 9), (heads_first, None)):
        result = attention(
            layer.query,
            layer.key_cache,
            layer.value_cache,
            scaling=0.25,
            sliding_window=window,
            softcap=None,
            sinks=None,
        )
        assert_equal(result, attend(layer, scaling=0.25, sliding_window=window))


def test_kv_is_written_where_the_slot_mapping_says_and_nowhere_else() -> None:
    step = make_paged_step([(5, 9), (1, 3)], num_seqs=4, num_tokens=12, head_dim=24, head_dim_v=16)
    key = torch.randn(2, 12, 24).transpose(0, 1)  # heads first, as models give it
    value = torch.randn(12, 2, 16)
    key_cache, value_cache = step.key_cache.clone(), step.value_cache.clone()
    write_kv(key, value, key_cache, value_cache, step.batch.slot_mapping)
    step.key_cache.flatten(0, 1)[step.batch.slot_mapping[:6]] = key[:6]
    step.value_cache.flatten(0, 1)[step.batch.slot_mapping[:6]] = value[:6]
    torch.testing.assert_close(key_cache[:-1], step.key_cache[:-1], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(value_cache[:-1], step.value_cache[:-1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sliding_window": 21},
        {"softcap": 3.0, "sinks": torch.tensor([1.0, 2.0, -3.0, 0.5])},
        {"sliding_window": 9, "softcap": 3.0, "sinks": torch.full((4,), 2.0)},
    ],
    ids=str,
)
@pytest.mark.parametrize("head_dim", [16, 32])  # 32: V is read in pairs
def test_a_cache_of_8_bits_is_read_with_its_scales(head_dim: int, options: dict[str, Any]) -> None:
    step = make_paged_step(
        [(1, 90), (12, 33), (1, 8)], num_seqs=4, num_tokens=20, head_dim=head_dim, scales=SCALES
    )  # fmt: skip
    assert_equal(run(step, **options), attend(step, scaling=0.25, **options))


@pytest.mark.parametrize(("num_heads", "head_dim", "head_dim_v"), [(6, 24, 16), (2, 40, 80), (2, 32, 33)])
def test_a_cache_of_8_bits_may_have_any_heads(num_heads: int, head_dim: int, head_dim_v: int) -> None:
    step = make_paged_step(
        [(1, 37), (9, 19)], num_heads=num_heads, head_dim=head_dim, head_dim_v=head_dim_v, scales=(1.0, 0.01)
    )
    assert_equal(run(step), attend(step, scaling=0.25))


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float16, 60_000.0), (torch.bfloat16, 1.0), (torch.bfloat16, 1e-30), (torch.bfloat16, 1e30)],
)
def test_a_query_of_16_bits_may_have_any_size_beside_a_cache_of_8_bits(dtype: torch.dtype, size: float) -> None:
    """The products are in float16, whose range is smaller."""
    step = make_paged_step([(1, 90), (9, 40)], dtype=dtype, head_dim=64, scales=SCALES)
    query = (step.query.float() / step.query.float().abs().amax(-1, keepdim=True) * size).to(dtype)
    step = dataclasses.replace(step, query=query)
    result = run(step, scaling=0.5 / size, softcap=2.0)
    assert result.dtype == dtype
    assert_equal(result, attend(step, scaling=0.5 / size, softcap=2.0), tolerance=torch.finfo(dtype).eps)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 9}], ids=str)
def test_nan_in_a_cache_of_8_bits_reaches_the_tokens_that_see_it_and_no_others(options: dict[str, Any]) -> None:
    for seed, plant_options in enumerate(PLANTS[:3]):
        step = make_paged_step(
            [(1, 40), (21, 37), (1, 9), (5, 5)], num_seqs=6, num_tokens=32, head_dim=32, seed=seed, scales=SCALES
        )  # fmt: skip
        found = check_planted(
            TritonBackend(), step, {**plant_options, "seed": seed}, TOLERANCE, scaling=0.25, **options
        )
        assert min(found) > 0, "a test needs tokens of both kinds"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kv_is_written_in_8_bits_as_torch_rounds_it(dtype: torch.dtype) -> None:
    step = make_paged_step([(5, 9), (1, 3)], num_seqs=4, num_tokens=12, head_dim=24, head_dim_v=16, scales=SCALES)
    key = (100 * torch.randn(2, 12, 24)).transpose(0, 1).to(dtype)
    value = torch.randn(12, 2, 16).to(dtype)
    key[:, 0, :6] = torch.tensor([torch.nan, torch.inf, -torch.inf, 60_000.0, -60_000.0, 0.0])
    key_cache, value_cache = step.key_cache.clone(), step.value_cache.clone()
    write_kv(key, value, key_cache, value_cache, step.batch.slot_mapping, *SCALES)
    for cache, before, numbers, scale in (
        (key_cache, step.key_cache, key, SCALES[0]),
        (value_cache, step.value_cache, value, SCALES[1]),
    ):
        expected = before.clone().view(torch.uint8)
        expected.flatten(0, 1)[step.batch.slot_mapping[:6]] = quantize(numbers[:6], scale).view(torch.uint8)
        assert torch.equal(cache.view(torch.uint8)[:-1], expected[:-1])
    first = key_cache.flatten(0, 1)[step.batch.slot_mapping[0], 0, :6].float()
    assert first.isnan().tolist() == [True, True, True, False, False, False]
    assert first[3:].tolist() == [448.0, -448.0, 0.0]
