from __future__ import annotations

import ast
import inspect
import mmap
from itertools import pairwise
from types import SimpleNamespace
from typing import Annotated, Generic

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipc.record_layout import FIELD_ALIGNMENT, Array, Each, HostArray, Layout, float32, int32, int64
from ipc.records import (
    Admissions,
    AdmittedColumns,
    ResultFields,
    StepFields,
    StepShape,
    prompt_layout,
    result_layout,
    step_layout,
)

DTYPES = st.sampled_from(["<i1", "<u1", "<i4", "<i8", "<f4", "<f8"])
SHAPES = st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple)
TABLES = st.lists(st.tuples(st.from_regex("[a-z]{1,8}", fullmatch=True), DTYPES, SHAPES), min_size=1, max_size=8,
                  unique_by=lambda field: field[0])  # fmt: skip


@settings(max_examples=50)
@given(TABLES, st.integers(0, 2))
def test_fields_are_aligned_disjoint_and_hold_what_is_written(table, index):
    layout = Layout("any", table)
    buffer = memoryview(bytearray((index + 1) * layout.num_bytes + 64))
    written, read = (layout.views(buffer, index * layout.num_bytes) for _ in range(2))
    for number, (name, dtype, shape) in enumerate(table, start=1):
        view = getattr(written, name)
        assert view.shape == shape
        assert view.dtype == np.dtype(dtype)
        assert layout.fields[name].offset % FIELD_ALIGNMENT == 0
        view[...] = number
    for number, (name, _, _) in enumerate(table, start=1):
        assert (getattr(read, name) == number).all()
    start, end = index * layout.num_bytes, (index + 1) * layout.num_bytes
    assert not any(buffer[:start].tobytes() + buffer[end:].tobytes())


@given(TABLES)
def test_equal_tables_have_equal_hashes(table):
    assert Layout("any", table).hash() == Layout("any", list(table)).hash()
    assert 0 <= Layout("any", table).hash() < 2**63


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("other", [("a", "<i4", (2,)), ("b", "<f4", (3,))]),
        ("step", [("b", "<i4", (2,)), ("a", "<f4", (3,))]),
        ("step", [("a", "<u4", (2,)), ("b", "<f4", (3,))]),
        ("step", [("a", "<i4", (2,)), ("b", "<f4", (4,))]),
        ("step", [("a", "<i4", (2,))]),
    ],
)
def test_any_difference_changes_the_hash(name, table):
    assert Layout(name, table).hash() != Layout("step", [("a", "<i4", (2,)), ("b", "<f4", (3,))]).hash()


def test_a_field_declared_twice_is_refused():
    with pytest.raises(AssertionError, match="field a is declared twice"):
        Layout("twice", [("a", "<i4", (1,)), ("a", "<i4", (1,))])


def test_a_record_beyond_the_end_of_its_buffer_is_refused():
    layout = Layout("end", [("a", "<i8", (8,))])
    with pytest.raises(ValueError, match="buffer"):
        layout.views(memoryview(bytearray(127)), 64)


def test_views_keep_their_mapping_from_being_closed():
    mapping = mmap.mmap(-1, 4096)
    views = Layout("held", [("a", "<i8", (1,))]).views(memoryview(mapping))
    with pytest.raises(BufferError):
        mapping.close()
    del views
    mapping.close()


def test_the_layouts_of_different_shapes_differ():
    small, large = StepShape(4, 64, 128, 16), StepShape(8, 64, 128, 16)
    layouts = [prompt_layout(), *(kind(shape) for kind in (step_layout, result_layout) for shape in (small, large))]
    assert len({layout.hash() for layout in layouts}) == 5


class Inner(Generic[Array]):
    weight: Annotated[Array, float32(3)]


class InnerWithRow(Inner[Array]):
    row: Annotated[Array, int32()]


class Outer(Generic[Array]):
    count: Annotated[Array, int64(1)]
    rows: Annotated[Array, int32("max_rows")]
    entry: Annotated[InnerWithRow[Array], Each("max_entries")]
    note: str  # no array: no field


BOUNDS = SimpleNamespace(max_rows=5, max_entries=2)


def test_a_class_declares_names_types_shapes_and_order():
    layout = Layout.of(Outer[HostArray], "outer", BOUNDS)
    assert [(f.name, f.dtype.str, f.shape) for f in layout.fields.values()] == [
        ("count", "<i8", (1,)), ("rows", "<i4", (5,)), ("entry_row", "<i4", (2,)), ("entry_weight", "<f4", (2, 3)),
    ]  # fmt: skip
    assert layout.hash() == Layout("outer", [(f.name, f.dtype.str, f.shape) for f in layout.fields.values()]).hash()


def test_views_are_an_instance_of_the_class_and_have_its_fields_only():
    layout = Layout.of(Outer[HostArray], "outer", BOUNDS)
    buffer = memoryview(bytearray(layout.num_bytes))
    record = layout.views(buffer)
    assert isinstance(record, Outer)
    record.entry.weight[1] = 0.5
    assert layout.fields["entry_weight"].of(layout.views(buffer)).tolist() == [[0] * 3, [0.5] * 3]
    with pytest.raises(AttributeError, match="num_row"):
        record.num_row  # noqa: B018


def test_every_field_of_a_ring_record_is_described():
    for kind in (StepFields, ResultFields, Admissions, AdmittedColumns):
        tree = ast.parse(inspect.getsource(kind)).body[0]
        for field, following in pairwise([*tree.body[1:], None]):
            if isinstance(field, ast.AnnAssign):
                assert isinstance(following, ast.Expr), f"{kind.__name__}.{field.target.id} has no docstring"


@pytest.mark.slow
def test_the_type_checker_sees_a_misspelt_field(tmp_path):
    import mypy.api  # takes a second

    snippet = tmp_path / "snippet.py"
    snippet.write_text(
        "from ipc.records import StepShape, step_layout\n"
        "step = step_layout(StepShape(1, 1, 1, 1)).views(memoryview(b''))\n"
        "step.num_tokens, step.admit.temperature\n"
        "step.num_token\n"
        "step.admit.temprature\n"
    )
    said, _, _ = mypy.api.run(["--strict", f"--cache-dir={tmp_path}", str(snippet)])
    assert [line.split(":")[1] for line in said.splitlines() if "attr-defined" in line] == ["4", "5"], said
