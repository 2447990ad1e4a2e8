"""Tells where a step's time goes, kernel by kernel, beside the bytes that the kernels must read.

Reads the report of `workers/gpu/profiling/step_profiler.py`. A kernel's name says what kind of work it does, and
nothing about its sizes. So products are known by their place: every layer runs its products in the same order, and the
head comes last. If a step does not run exactly these products, all of them share one line with the bytes of all
weights. Kernels of other kinds have no bytes here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from pipeline.bench.roofline import ModelShape

PRODUCTS: Final = "products"  # of the layers
ALL_PRODUCTS: Final = "products and head"  # if their places are not known
ATTENTION: Final = "attention"
HEAD: Final = "head"
OTHER: Final = "others"
# Names of cuBLAS, CUTLASS, torch's operators on the CPU, Inductor's templates, and our own kernels.
_PRODUCT: Final = re.compile(
    r"nvjet|gemm|gemv|cutlass|_tem_fused|^_(words|vector|matrix)$|^aten::(linear|addmm|mm)$", re.IGNORECASE
)
_SUM_OF_PARTS: Final = re.compile(r"split_?k.*reduce|reduce.*split_?k", re.IGNORECASE)  # of cuBLAS's split products
_ATTENTION: Final = re.compile(r"^(decode|prefill|combine)$|flash|fmha|attention", re.IGNORECASE)
_COMBINE: Final = re.compile(r"combine", re.IGNORECASE)  # the kernels of attention that read no KV
_FUSED: Final = re.compile(r"^triton_(poi|red|per)_")  # Inductor names these after neighbours, products included
_PARTS: Final = {"query, key, value": 3, "output": 1, "gate, up": 2, "down": 1}  # products of a layer, if not fused
_MAX_NAME: Final = 56  # characters
_LEAST_ARGUMENT: Final = 16  # characters of a template argument that tells one kernel from another; types are shorter


@dataclass(frozen=True)
class KernelRow:
    """A kernel in one step, or a group of them.

    Args:
        group: PRODUCTS and HEAD, or ALL_PRODUCTS; ATTENTION; OTHER.
        what: the product that it computes, if its place tells; else as `group`.
        name: the kernel's; "" for a group.
        launches: in a step.
        us: that all launches together add to a step.
        num_bytes: of weights or KV that they must read; None = unknown.
    """

    group: str
    what: str
    name: str
    launches: float
    us: float
    num_bytes: float | None = None


@dataclass(frozen=True)
class KernelTable:
    """One step. Args: rows: by time. groups: the rows' sums. busy_us: of the device in a step, copies included.
    step_us: from one step to the next. note: how it was measured."""

    rows: list[KernelRow]
    groups: list[KernelRow]
    busy_us: float
    step_us: float
    note: str


def kernel_table(profile: dict[str, Any], shape: ModelShape | None) -> KernelTable:
    """Return the table of a profile. `shape` None: no bytes are known."""
    launches, note = _launches(profile)
    has_order = profile.get("typical_step") is not None
    labels = _labels([name for name, _, _ in launches], shape if has_order else None)
    summed: dict[tuple[str, str, str], KernelRow] = {}
    for (name, count, us), (group, what) in zip(launches, labels, strict=True):
        row = summed.get((group, what, name)) or KernelRow(group, what, name, 0.0, 0.0)
        summed[group, what, name] = replace(row, launches=row.launches + count, us=row.us + us)
    rows = [row for row in summed.values() if row.us > 0]  # the others ran beside these all the time
    groups = list(_groups(rows))
    if shape is not None:
        known = _bytes_by_label(shape, profile.get("load"))
        groups = [replace(row, num_bytes=known.get(row.what)) for row in groups]
        rows = [replace(row, num_bytes=_bytes_of(row, known, rows)) for row in rows]
    num_steps = profile["num_steps"]
    busy_us, step_us = (profile[key] / num_steps for key in ("busy_us", "window_us"))
    return KernelTable(sorted(rows, key=lambda row: -row.us), groups, busy_us, step_us, note)


def _groups(rows: list[KernelRow]) -> Iterator[KernelRow]:
    for group in (PRODUCTS, HEAD, ALL_PRODUCTS, ATTENTION, OTHER):
        members = [row for row in rows if row.group == group]
        if members:
            launches, us = sum(row.launches for row in members), sum(row.us for row in members)
            yield KernelRow(group, group, "", launches, us)


def short_name(name: str) -> str:
    """Return a kernel's name without return type, arguments and outer namespaces, in at most _MAX_NAME characters.

    Of its template arguments, only the first that is long enough to tell kernels apart is left.
    """
    short = name
    if "::" in name:
        plain, arguments = _without_brackets(name.replace("(anonymous namespace)::", ""))
        short = "::".join(plain.split(" ")[-1].split("::")[-2:])
        last_parts = [argument.strip().split("::")[-1] for argument in arguments.split(",")]
        telling = [part for part in last_parts if len(part) >= _LEAST_ARGUMENT]
        short += f"<{telling[0]}>" if telling else ""
    return short if len(short) <= _MAX_NAME else short[: _MAX_NAME - 3] + "..."


def _without_brackets(name: str) -> tuple[str, str]:
    """Return the name up to its arguments without its template arguments, and these without theirs."""
    plain, arguments, depth = "", "", 0
    for character in name:
        if character == "(" and depth == 0:
            break
        if character in "<>":
            depth += 1 if character == "<" else -1
        elif depth == 0:
            plain += character
        elif depth == 1:
            arguments += character
    return plain.strip(), arguments


def _launches(profile: dict[str, Any]) -> tuple[list[tuple[str, float, float]], str]:
    """Return (name, launches, us) of a step, in the order of the launches if it is known; and how it was measured."""
    step, num_steps, load = profile.get("typical_step"), profile["num_steps"], profile.get("load")
    if step is not None:
        launches = [(name, 1.0, us) for name, us in step["launches"]]
        note = f"medians of {step['num_alike']} of {step['num_steps']} steps, which ran the same kernels"
    else:
        launches = [(name, count / num_steps, added / num_steps) for name, count, _, added in profile["kernels"]]
        note = f"means of {num_steps} steps; calls within calls are counted, and their time belongs to the outer ones"
    if load is not None:
        note += (
            f"; a step has {load['num_seqs']:g} sequences, {load['num_tokens']:g} tokens, and "
            f"{load['num_kv_read']:,g} tokens of KV"
        )
    return launches, note


def _kind(name: str) -> str:
    if _FUSED.search(name):
        return OTHER
    if _ATTENTION.search(name):
        return ATTENTION
    return ALL_PRODUCTS if _PRODUCT.search(name) or _SUM_OF_PARTS.search(name) else OTHER


def _labels(names: list[str], shape: ModelShape | None) -> list[tuple[str, str]]:
    """Return the group of each launch and what it computes. `shape` None: the launches have no order."""
    kinds = [_kind(name) for name in names]
    labels = [(kind, kind) for kind in kinds]
    products = [i for i, name in enumerate(names) if kinds[i] == ALL_PRODUCTS and not _SUM_OF_PARTS.search(name)]
    order = [] if shape is None else _order(shape, len(products))
    if not order:
        return labels
    for i, label in zip(products, order, strict=True):
        labels[i] = label
    last: tuple[str, str] | None = None
    for i, name in enumerate(names):
        if i in products:
            last = labels[i]
        elif kinds[i] == ALL_PRODUCTS and last is not None and _SUM_OF_PARTS.search(name):
            labels[i] = last[0], f"{last[1]}: sum of parts"
    return labels


def _order(shape: ModelShape, num_products: int) -> list[tuple[str, str]]:
    """Return the labels of a step's products in their order; empty if a step of this model has another number."""
    fused = [(PRODUCTS, what) for what in shape.product_bytes()]
    single = [label for label in fused for _ in range(_PARTS[label[1]])]
    for layer in (fused, single):
        if num_products == shape.num_layers * len(layer) + 1:
            return [*layer * shape.num_layers, (HEAD, HEAD)]
    return []


def _bytes_by_label(shape: ModelShape, load: dict[str, float] | None) -> dict[str, float]:
    """Return the bytes that a step reads, by `KernelRow.what`."""
    layers = {what: shape.num_layers * num_bytes for what, num_bytes in shape.product_bytes().items()}
    known: dict[str, float] = {
        **layers, PRODUCTS: sum(layers.values()), HEAD: shape.head_bytes, ALL_PRODUCTS: shape.weight_bytes,
    }  # fmt: skip
    if load is not None:
        known[ATTENTION] = shape.kv_bytes_per_token * load["num_kv_read"]
    return known


def _bytes_of(row: KernelRow, known: dict[str, float], rows: Iterable[KernelRow]) -> float | None:
    """Return the bytes of a kernel; None if other kernels may have read a part of them."""
    if row.group == ATTENTION and _COMBINE.search(row.name):
        return None
    rivals = [r for r in rows if r.what == row.what and not (r.group == ATTENTION and _COMBINE.search(r.name))]
    return known.get(row.what) if rivals == [row] else None
