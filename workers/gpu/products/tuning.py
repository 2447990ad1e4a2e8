"""Measures, at a first start, which plan computes each product fastest on this device, and keeps the result on disk.

A plan is chosen where it beats the vendor's product. Products are measured one after another on the weights of all
layers, which are more than the device's caches hold, in a graph, as a step runs them. A process that starts in the
place of one that died reads the same file, so it computes the same bits.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Final

import torch

from workers.gpu.products.fp8 import BLOCK, from_fp8, has_blocks
from workers.gpu.products.int4 import from_int4, group_of
from workers.gpu.products.multiply import (
    Key,
    Shape,
    can_scale,
    chosen,
    dequantised,
    key_of,
    multiply,
    run_plan,
    shape_of,
)
from workers.gpu.products.plan import ROW_CLASSES, Plan, candidates
from workers.gpu.products.product import Product

logger = logging.getLogger(__name__)

_REPLAYS: Final = 5
_WORTH: Final = 0.98  # of the vendor's time: a plan that gains less is not chosen
_TOLERANCE: Final = 2e-2  # of a product in 16 bits, as the norm of its error over the norm of the result
_MAX_MEASURED: Final = 16  # layers, whose weights take turns
_CHECKED_OUTPUTS: Final = 4096  # at a time
_CHECKED_ROWS: Final = 160  # of a product in blocks of fp8: whole tiles and a part of one
_FP8_TOLERANCE: Final = 0.08  # of such a product, whose rows are rounded to fp8


def choose_plans(
    products: Sequence[Product],
    x_dtype: torch.dtype,
    max_rows: int,
    device: torch.device,
    folder: Path,
    progress: Callable[[float], None] = lambda _: None,
    gated: Collection[Shape] = (),
) -> None:
    """Choose the plan of each shape of these products, for steps of up to `max_rows` rows, and check each product.
    Products in fp8 or 4 bits take rows of `x_dtype`.

    `gated` are the shapes of products that compute gates and values. They get a plan that applies the gates, where it
    is faster than their product and another kernel for the gates.

    Reads what an earlier start on the same kind of device measured from a file in `folder`, and adds to it.
    """
    kept = KeptPlans(folder, device)
    groups: dict[Shape, list[Product]] = {}
    for product in products:
        groups.setdefault(shape_of(product.weight, product.scale), []).append(product)
    classes = [rows for i, rows in enumerate(ROW_CLASSES) if i == 0 or ROW_CLASSES[i - 1] < max_rows]
    works = [
        (group, rows, is_gated)
        for shape, group in groups.items()
        for rows in classes
        for is_gated in ((False, True) if shape in gated else (False,))
    ]
    for shape, group in groups.items():
        if not _can_multiply_blocks(group[0], x_dtype, device):
            dequantised.add(shape)
    for i, (group, rows, is_gated) in enumerate(works):
        progress(i / len(works))
        weight, scale = group[0].weight, group[0].scale
        dtype = weight.dtype if scale is None else x_dtype  # some routers stay in float32
        key = key_of(weight, scale, dtype, rows, is_gated)
        if key not in kept:
            kept.keep(key, _fastest(group, dtype, rows, device, is_gated=is_gated))
        plan = kept[key]
        if plan is None:
            chosen.pop(key, None)
        elif (error := max(error_of(plan, each, dtype, rows, is_gated=is_gated) for each in group)) < _TOLERANCE:
            chosen[key] = plan
        else:
            logger.warning("products %s run as the vendor's library computes them: ours differ by %.2g", key, error)


def _can_multiply_blocks(product: Product, x_dtype: torch.dtype, device: torch.device) -> bool:
    """Compile the kernels of many rows with blocks of fp8, because compiling would hold up the first such step, and
    check them. False = one fails or is wrong. True for all other products."""
    weight, scale = product.weight, product.scale
    if scale is None or not has_blocks(scale) or not can_scale(weight, scale, x_dtype, device):
        return True
    from workers.gpu.products.triton_blocks import TILES, multiply_blocks  # without CUDA there may be no triton

    x = torch.randn(_CHECKED_ROWS, product.in_features, device=device).to(x_dtype)
    expected = _in_float32(x, weight, scale)
    try:
        for tile in TILES:
            out = torch.full_like(expected, torch.nan, dtype=x_dtype)
            multiply_blocks(x, weight, scale, None, out, tile)
            error = _relative_error(out, expected)
            if error >= _FP8_TOLERANCE:
                raise ArithmeticError(f"the product in tiles of {tile} differs by {error:.2g}")
    except Exception as failure:
        if isinstance(failure, torch.AcceleratorError):
            raise
        logger.warning(
            "products of %d x %d weights in blocks of fp8 are dequantised each time in steps of more than 64 tokens, "
            "because their kernel does not work here: %s", *weight.shape, failure,
        )  # fmt: skip
        return False
    return True


def error_of(plan: Plan | None, product: Product, x_dtype: torch.dtype, rows: int, *, is_gated: bool = False) -> float:
    """The norm of the error over the norm of the product in float32, on random rows; NaN counts as infinite.

    `plan` None: of what `multiply` does.
    """
    weight, scale, bias = product.weight, product.scale, product.bias
    generator = torch.Generator(weight.device).manual_seed(rows)
    x = torch.randn(rows, product.in_features, generator=generator, device=weight.device).to(x_dtype)
    expected = _in_float32(x, weight, scale)
    if bias is not None:
        expected += bias.float()
    if is_gated:
        gates, values = expected.chunk(2, -1)
        expected = torch.nn.functional.silu(gates) * values
    out = torch.full_like(expected, torch.nan, dtype=x_dtype)
    if plan is None:
        multiply(x, weight, scale, bias, is_gated=is_gated, out=out)
    else:
        run_plan(plan, x, weight, scale, bias, is_gated=is_gated, out=out)
    return _relative_error(out, expected)


def _relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the error over the norm of what is expected; NaN counts as infinite."""
    error = float((result.float() - expected).norm() / expected.norm().clamp(min=1e-30))
    return error if error == error else float("inf")


def _in_float32(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """x times the dequantised weight, a part of the outputs at a time: the device may be almost full."""
    parts = torch.split(weight, _CHECKED_OUTPUTS)
    scales = [None] * len(parts) if scale is None else _split(scale)
    full = (_wide(w, s) for w, s in zip(parts, scales, strict=True))
    return torch.cat([torch.nn.functional.linear(x.float(), part) for part in full], dim=1)


def _split(scale: torch.Tensor) -> Sequence[torch.Tensor]:
    """The scales of _CHECKED_OUTPUTS outputs at a time."""
    if scale.ndim == 3:
        return torch.split(scale, _CHECKED_OUTPUTS, 1)
    return torch.split(scale, _CHECKED_OUTPUTS // BLOCK if has_blocks(scale) else _CHECKED_OUTPUTS)


def _wide(weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """A weight of any format in float32, [N, K]."""
    if scale is None:
        return weight.float()
    return (from_int4 if group_of(weight, scale) else from_fp8)(weight, scale, torch.float32)


def _fastest(
    group: Sequence[Product], x_dtype: torch.dtype, rows: int, device: torch.device, *, is_gated: bool
) -> Plan | None:
    """The plan that computes a product of `rows` rows in the shortest time; None = `multiply` does without one."""
    measured = list(group[:_MAX_MEASURED])
    weight, scale = measured[0].weight, measured[0].scale
    num_outputs, num_columns = weight.shape
    x = torch.randn(rows, measured[0].in_features, device=device).to(x_dtype)
    chosen.pop(key_of(weight, scale, x_dtype, rows, is_gated), None)

    def otherwise() -> None:
        for each in measured:
            multiply(x, each.weight, each.scale, each.bias, is_gated=is_gated)

    times: dict[Plan | None, float] = {None: _WORTH * _time_us(otherwise, device)}
    inputs, block = group_of(weight, scale), BLOCK if has_blocks(scale) else 0
    for plan in candidates(
        rows, num_outputs, num_columns, weight.itemsize, is_gated=is_gated, group=inputs, block=block
    ):

        def ours(plan: Plan = plan) -> None:
            for each in measured:
                run_plan(plan, x, each.weight, each.scale, each.bias, is_gated=is_gated)

        try:
            times[plan] = _time_us(ours, device)
        except Exception as error:  # too much shared memory, or a compiler that fails: another plan serves
            if isinstance(error, torch.AcceleratorError):
                raise
            logger.debug("%s cannot run here: %r", plan, error)
    return min(times, key=times.__getitem__)


def _time_us(work: Callable[[], None], device: torch.device) -> float:
    """Microseconds of `work` in a graph, the median of a few replays."""
    work()  # compiles
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times: list[float] = []
    for _ in range(_REPLAYS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    graph.reset()
    return statistics.median(times[1:])


class KeptPlans:
    """The plans in a file: one for each kind of device, version of torch, and state of these kernels' code."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        sources = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        known = hashlib.sha256(b"\0".join((name.encode(), torch.__version__.encode(), *sources))).hexdigest()[:16]
        self._path = folder / f"{known}.json"
        self._plans = self._read()
        self._is_writable = True

    def __contains__(self, key: Key) -> bool:
        return str(key) in self._plans

    def __getitem__(self, key: Key) -> Plan | None:
        return self._plans[str(key)]

    def keep(self, key: Key, plan: Plan | None) -> None:
        """Add a measured plan, here and in the file. If another process has added one meanwhile, that one counts: then
        both compute the same bits, and so do their successors. If writing fails, the next start measures again."""
        try:
            if self._is_writable:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._locked():
                    self._plans |= self._read()
                    self._plans.setdefault(str(key), plan)
                    self._write()
        except OSError as error:
            self._is_writable = False
            logger.warning(
                "cannot keep the plans of products in %s, so each start measures them: %s", self._path, error
            )
        self._plans.setdefault(str(key), plan)

    def _read(self) -> dict[str, Plan | None]:
        try:
            stored = json.loads(self._path.read_bytes())
            return {key: plan and Plan(**plan) for key, plan in stored.items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, AttributeError) as error:
            logger.warning("cannot read the plans of products in %s, so they are measured again: %s", self._path, error)
        return {}

    def _write(self) -> None:
        """Put the plans on disk, all at once."""
        stored = {key: plan and asdict(plan) for key, plan in self._plans.items()}
        own = self._path.with_suffix(f".{os.getpid()}")
        own.write_text(json.dumps(stored, indent=1))
        own.replace(self._path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock the folder. A file system may have no locks; then the last of several processes at once counts."""
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            with suppress(OSError):
                fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)
