"""Products in place of linear layers: the same results, 8 bits within their bound, and plans that are kept on disk."""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from workers.gpu.e4m3 import E4M3, E4M3_MAX
from workers.gpu.products.fp8 import from_fp8, to_fp8
from workers.gpu.products.int4 import are_alike, from_int4, join_scales, scale_of, to_int4
from workers.gpu.products.multiply import key_of, multiply
from workers.gpu.products.plan import MAX_ROWS, ROW_CLASSES, VECTOR_ROWS, Plan, candidates, row_class
from workers.gpu.products.product import Product, quantizable, replace_linears
from workers.gpu.products.tuning import KeptPlans, choose_plans, error_of

CPU = torch.device("cpu")


class Layer(nn.Module):
    """A router, a linear layer with a bias, and one inside a list."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(32, 8, bias=False)
        self.up = nn.Linear(32, 320)
        self.others = nn.ModuleList([nn.Linear(320, 288, bias=False)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.others[0](self.up(x)) * self.router(x).amax(-1, keepdim=True)
        return result


@torch.inference_mode()
def test_products_take_the_place_of_linear_layers_on_the_same_weights() -> None:
    layer, x = Layer().eval(), torch.randn(2, 3, 32)
    weights = {name: weight.data_ptr() for name, weight in layer.named_parameters()}
    expected = layer(x)
    assert len(products := replace_linears([layer])) == 3
    assert torch.equal(layer(x), expected)
    assert {name: weight.data_ptr() for name, weight in layer.named_parameters()} == weights
    assert {product.out_features for product in quantizable(products)} == {320, 288}


@torch.inference_mode()
def test_the_rows_of_a_products_weight_follow_each_other_as_the_kernels_read_them() -> None:
    weight, x = torch.randn(48, 96)[:, :64], torch.randn(3, 64)
    product = Product(weight)
    assert product.weight.is_contiguous()
    torch.testing.assert_close(product(x), x @ weight.T)


@torch.inference_mode()
def test_rounding_to_fp8_halves_the_bytes_and_changes_a_product_by_a_few_percent() -> None:
    product, x = Product(torch.randn(300, 256).bfloat16()), torch.randn(5, 256).bfloat16()
    exact = product(x).float()
    num_bytes = product.weight.nbytes
    product.to_fp8()
    assert product.scale is not None
    assert product.weight.dtype == E4M3
    assert 2 * product.weight.nbytes == num_bytes
    result = product(x)
    full = from_fp8(product.weight, product.scale, torch.float32)
    torch.testing.assert_close(result.float(), x.float() @ full.T, rtol=0.02, atol=0.2)
    assert 0.005 < (result.float() - exact).norm() / exact.norm() < 0.04


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_each_row_in_fp8_keeps_its_largest_number_whatever_its_size(dtype: torch.dtype) -> None:
    rows = torch.randn(4, 64) * torch.tensor([1e-6, 1, 1e4, 0])[:, None]
    rows[1, 0] = 0
    values, scale = to_fp8(rows.to(dtype))
    assert values.float().abs().amax(1)[:3].tolist() == [E4M3_MAX] * 3
    restored = from_fp8(values, scale, torch.float32)
    assert (restored[3] == 0).all()
    error = (restored - rows.to(dtype).float()).abs().amax(1)
    assert (error[:3] <= rows.abs().amax(1)[:3] / 25).all()  # half a step of the largest numbers is 1/28 of them


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_by_the_scale_that_the_values_were_made_with_gives_their_numbers_again(dtype: torch.dtype) -> None:
    codes = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8).repeat(64, 1)  # no NaN
    scale = torch.rand(64) * torch.logspace(-6, 1, 64) + 1e-9
    values, kept = to_fp8(from_fp8(codes.view(E4M3), scale, dtype), scale)
    assert kept is scale
    assert torch.equal(values.view(torch.uint8), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_by_the_scales_of_blocks_gives_their_numbers_again_and_keeps_what_is_none(dtype: torch.dtype) -> None:
    """The rows are more than are made wide at a time, and end inside of a block."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(1100, 2)
    scale = torch.rand(9, 4) * torch.logspace(-6, 1, 9)[:, None] + 1e-9
    wide = from_fp8(codes.view(E4M3), scale, dtype)
    for row, column in ((0, 0), (127, 127), (128, 256), (1099, 511)):
        number = codes[row, column].view(E4M3).float() * scale[row // 128, column // 128]
        torch.testing.assert_close(wide[row, column], number.to(dtype), equal_nan=True)
    assert wide.isnan().sum() == 1100 * 4
    values, kept = to_fp8(wide, scale)
    assert kept is scale
    assert torch.equal(values.float().isnan(), wide.isnan())
    assert torch.equal(values.view(torch.uint8)[~wide.isnan()], codes[~wide.isnan()])


@torch.inference_mode()
def test_a_product_of_blocks_is_checked_against_its_own_weights_a_part_of_its_outputs_at_a_time() -> None:
    product = Product(torch.randn(4300, 256))
    product.to_fp8(torch.rand(34, 2) + 0.5)
    assert error_of(None, product, torch.float32, 3) < 1e-5


def test_a_linear_layer_that_a_model_uses_in_several_places_becomes_one_product() -> None:
    parent, other, shared = nn.Module(), nn.Module(), nn.Linear(32, 320)
    parent.first = parent.second = other.first = shared
    (product,) = replace_linears([parent, other])
    assert all(each is product for each in (parent.first, parent.second, other.first))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("has_zeros", [False, True], ids=["symmetric", "zero points"])
def test_packing_dequantised_weights_gives_all_16_numbers_again(
    dtype: torch.dtype, scale_dtype: torch.dtype, has_zeros: bool
) -> None:
    """The numbers are packed at once, and one by one here: plane j of column c is input j * K / 8 + c."""
    num_rows, num_groups = 68, 3
    generator = torch.Generator().manual_seed(0)
    numbers = torch.stack([torch.randperm(32, generator=generator) % 16 for _ in range(num_rows * num_groups)])
    numbers = numbers.view(num_rows, num_groups, 32)
    zeros = torch.arange(num_rows * num_groups).view(num_rows, num_groups) % 17 if has_zeros else None
    scales = (torch.rand(num_rows, num_groups, generator=generator) + 0.5) * torch.logspace(-6.8, 3, num_rows)[:, None]
    scales[-1] *= -1
    scales = scales.to(scale_dtype)
    less = 8 if zeros is None else zeros[..., None]
    values = ((numbers - less) * scales.float()[..., None]).to(dtype).flatten(1)
    scale = scale_of(scales, zeros, values)
    assert scale is not None
    assert scale.dtype == scale_dtype
    assert len(scale) == 1 + has_zeros
    weight = to_int4(values, scale)
    assert weight.nbytes * 2 == values.numel()
    planes = numbers.view(num_rows, 8, 12).tolist()
    expected = [[sum(planes[n][j][c] << 4 * j for j in range(8)) for c in range(12)] for n in range(num_rows)]
    assert (weight.long() & 0xFFFFFFFF).tolist() == expected
    assert torch.equal(from_int4(weight, scale, dtype), values)


@pytest.mark.parametrize(
    ("scales", "values"),
    [
        (torch.tensor([[0.0]]), torch.zeros(1, 32)),
        (torch.tensor([[torch.nan]]), torch.zeros(1, 32)),
        (torch.tensor([[5e-8]]), torch.full((1, 32), 5e-8).half()),  # less than float16's steps
        (torch.tensor([[9e3]]), torch.full((1, 32), 7.2e4).half()),  # more than it holds
        (torch.ones(1, 1), torch.zeros(1, 48)),
        (torch.ones(1, 2), torch.zeros(1, 48)),
        (torch.ones(1, 1, dtype=torch.int32), torch.zeros(1, 32)),
    ],
    ids=["zero", "NaN", "tiny", "large", "groups of 48", "groups of 24", "integers"],
)
def test_groups_whose_numbers_would_be_lost_stay_wide(scales: torch.Tensor, values: torch.Tensor) -> None:
    assert scale_of(scales, None, values) is None


def test_scales_are_joined_if_they_are_of_one_kind() -> None:
    plain, zeros = torch.ones(1, 3, 2), torch.stack([torch.ones(5, 2), torch.full((5, 2), 3.0)])
    assert are_alike(plain, zeros)
    joined = join_scales([plain, zeros])
    assert joined[0].tolist() == [[1.0, 1.0]] * 8
    assert joined[1].tolist() == [[8.0, 8.0]] * 3 + [[3.0, 3.0]] * 5
    assert join_scales([torch.zeros(2, 3), torch.ones(1, 3)]).sum(1).tolist() == [0, 0, 3]
    for other in (torch.ones(1, 5, 4), torch.ones(5), torch.ones(5, 2), plain.half(), None):
        assert not are_alike(plain, other)
        assert are_alike(other, other)


@pytest.mark.parametrize(
    "scale", [torch.ones(320), torch.ones(3, 1), torch.ones(2, 320, 1)], ids=["fp8", "blocks", "4 bits"]
)
def test_a_layer_that_its_checkpoint_stores_in_few_bits_frees_its_wide_weight_at_once(
    scale: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [nn.Sequential(nn.Linear(128, 320)) for _ in range(3)]
    for layer in layers:
        layer[0].weight_scale = scale
    weights = [weakref.ref(layer[0].weight) for layer in layers]
    alive: list[int] = []

    def count(convert: Callable[..., None]) -> Callable[..., None]:
        def counted(product: Product, scale: torch.Tensor) -> None:
            convert(product, scale)
            alive.append(sum(weight() is not None for weight in weights))

        return counted

    for name in ("to_fp8", "to_int4"):
        monkeypatch.setattr(Product, name, count(getattr(Product, name)))
    products = replace_linears(layers)
    assert all(product.weight.dtype == (torch.int32 if scale.ndim == 3 else E4M3) for product in products)
    assert alive == [3, 2, 1]


def test_what_is_not_a_number_does_not_vanish_in_fp8() -> None:
    values, scale = to_fp8(torch.tensor([[1.0, torch.nan], [torch.inf, 1.0], [1.0, 2.0]]))
    restored = from_fp8(values, scale, torch.float32)
    assert restored[0].isnan().any()
    assert not restored[1].isfinite().all()
    assert restored[2].isfinite().all()


def test_float16_does_not_overflow_before_the_scale() -> None:
    weight, scale = to_fp8(torch.ones(300, 4096))
    x = torch.ones(3, 4096, dtype=torch.float16)
    assert torch.equal(multiply(x, weight, scale), torch.full((3, 300), 4096.0).half())


@torch.inference_mode()
def test_the_result_can_be_written_where_it_is_wanted() -> None:
    x, weight, bias = torch.randn(3, 128), torch.randn(48, 128), torch.randn(48)
    groups, blocks = torch.ones(1, 48, 4), torch.tensor([[0.5]])
    packed = ((to_int4(weight, groups), groups), to_fp8(weight, blocks))
    for stored, scale in ((weight, None), to_fp8(weight), *packed):
        out = torch.full((3, 48), torch.nan)
        expected = multiply(x, stored, scale, bias)
        assert multiply(x, stored, scale, bias, out=out) is out
        torch.testing.assert_close(out, expected)


def test_products_without_rows_have_no_plan_because_a_kernel_would_read_a_row_that_does_not_exist() -> None:
    assert row_class(0) is None
    weight, scale = to_fp8(torch.randn(32, 64))
    x = torch.empty(0, 64, dtype=torch.bfloat16)
    assert multiply(x, weight, scale).shape == (0, 32)


def test_every_number_of_rows_has_its_class_and_plans_fit_their_shapes() -> None:
    served = {1: 2, 2: 2, 3: 16, 16: 16, 17: 32, 33: 64, MAX_ROWS: 64, MAX_ROWS + 1: None}
    assert {rows: row_class(rows) for rows in served} == served
    for num_outputs, num_inputs in ((6144, 4096), (4096, 14336), (128256, 2048), (960, 576), (100, 60)):
        for rows, weight_bytes in itertools.product(ROW_CLASSES, (1, 2)):
            plans = candidates(rows, num_outputs, num_inputs, weight_bytes)
            assert all(plan.fits(num_outputs, num_inputs) for plan in plans)
            assert all((plan.kernel != "matrix") == (rows <= VECTOR_ROWS) for plan in plans)
            assert plans or num_inputs < 1024
            assert len(set(plans)) == len(plans)
            plans = candidates(rows, num_outputs, num_inputs, 1, block=128)
            assert all(plan.fits(num_outputs, num_inputs, block=128) for plan in plans)
            assert all(plan.tile_k <= 128 for plan in plans if plan.kernel == "matrix")
            assert plans or num_inputs < 1024
            for group in (32, 64, num_inputs):
                plans = candidates(rows, num_outputs, num_inputs // 8, 4, group=group)
                assert all(plan.fits(num_outputs, num_inputs // 8, group) for plan in plans)
                assert plans or num_inputs < 1024


def test_plans_are_kept_for_the_next_start_and_a_damaged_file_is_measured_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = key_of(torch.empty(64, 32), None, torch.bfloat16, 16)
    other = key_of(torch.empty(32, 32), None, torch.bfloat16, 16)
    plan = Plan("matrix", 64, 32, 4, 3, split=2)
    plans = KeptPlans(tmp_path / "new", CPU)
    assert key not in plans
    plans.keep(key, plan)
    plans.keep(other, None)
    plans = KeptPlans(tmp_path / "new", CPU)
    assert plans[key] == plan
    assert plans[other] is None
    (file,) = (tmp_path / "new").iterdir()
    for damage in ('{"a": 1', '{"a": {"kernel": "matrix"}}', "[]"):
        file.write_text(damage)
        with caplog.at_level(logging.WARNING):
            assert key not in KeptPlans(tmp_path / "new", CPU)
        assert "measured again" in caplog.text
        caplog.clear()


def test_layers_that_stay_in_float32_are_measured_with_the_inputs_that_they_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As LongCat's router in a model of float16."""
    products = [Product(torch.randn(320, 64).to(dtype)) for dtype in (torch.float32, torch.float16, torch.float16)]
    products[2].to_fp8()
    measured = {}

    def measure(group: Sequence[Product], x_dtype: torch.dtype, rows: int, *_: object, is_gated: bool) -> None:
        measured[group[0].weight.dtype] = x_dtype
        group[0](torch.zeros(rows, 64, dtype=x_dtype))

    monkeypatch.setattr("workers.gpu.products.tuning._fastest", measure)
    choose_plans(products, torch.float16, 2, CPU, tmp_path)
    assert measured == {torch.float32: torch.float32, torch.float16: torch.float16, E4M3: torch.float16}


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    plans = KeptPlans(tmp_path / "file" / "folder", CPU)
    keys = [key_of(torch.empty(64, 32), None, torch.bfloat16, rows) for rows in (16, 32)]
    for key in keys:
        plans.keep(key, None)
    assert all(key in plans for key in keys)
    assert caplog.text.count("each start measures them") == 1


def test_processes_that_measure_at_the_same_time_agree_and_lose_nothing(tmp_path: Path) -> None:
    key, other = (key_of(torch.empty(64, 32), None, torch.bfloat16, rows) for rows in (16, 32))
    first, second = KeptPlans(tmp_path, CPU), KeptPlans(tmp_path, CPU)
    first.keep(key, Plan("matrix", 64, 32, 4, 3))
    second.keep(key, None)
    second.keep(other, None)
    first.keep(other, Plan("matrix", 64, 32, 4, 3))
    for plans in (first, second, KeptPlans(tmp_path, CPU)):
        assert plans[key] == Plan("matrix", 64, 32, 4, 3)
        assert plans[other] is None


@torch.inference_mode()
def test_rows_that_lie_across_memory_are_put_in_order_for_the_kernels() -> None:
    weight, scale = to_fp8(torch.randn(48, 64))
    x = torch.randn(64, 5).t()
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workers.gpu.products.multiply._unscaled", lambda x, *_: seen.append(x.stride(1)))
        multiply(x, weight, scale)
    assert seen == [1]
