"""The throughput benchmark's table: a column per engine, and a line per figure that at least one of them has."""

from __future__ import annotations

from typing import Any, Final

from rich.console import Console
from rich.table import Table

from pipeline.bench.figures import Row
from pipeline.bench.kernel_table import OTHER, KernelTable, short_name

_LINES: Final = {
    "num_requests": "requests",
    "num_background": "streams",
    "num_arrivals": "arrivals beside them",
    "num_unanswered": "... unanswered at the end",
    "prompt_len": "prompt, tokens",
    "output_len": "output, tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "ready_s": "ready after, s",
    "total_s": "total, s",
    "estimated_total_s": "total at full length, estimated, s",
    "seconds": "measured for, s",
    "floor_s": "floor: bytes, s",
    "x_floor": "total / floor",
    "roofline_s": "roofline: by operation, s",
    "x_roofline": "total / roofline",
    "tokens_per_s": "tokens/s",
    "prompt_tokens_per_s": "prompt tokens/s",
    "tflops_per_s": "TFLOP/s",
    "matrix_rate_percent": "... of the matrix rate, %",
    "num_steps": "steps",
    "mixed_percent": "steps with prompts, %",
    "whole_ms_per_step": "ms/step, whole run",
    "steady_ms_per_step": "ms/step, steady",
    "steady_device_ms": "... on the device",
    "steady_floor_ms": "floor of a step, ms",
    "x_steady_floor": "step / floor",
    "steady_roofline_ms": "roofline of a step, ms",
    "x_steady_roofline": "step / roofline",
    "whole_idle_percent": "idle between steps, whole run, %",
    "steady_idle_percent": "idle between steps, steady, %",
    "profile_ms_per_step": "ms/step, profiled",
    "profile_idle_percent": "idle between steps, profiled, %",
    "profile_idle_p50_us": "... of one step, p50 us",
    "profile_idle_max_us": "... longest, us",
    "profile_busy_percent": "busy, profiled, %",
    "gap_p50_ms": "between tokens, p50 ms",
    "gap_p99_ms": "... p99 ms",
    "first_token_p50_ms": "first token, p50 ms",
    "first_token_p99_ms": "... p99 ms",
    "num_preemptions": "preemptions",
}
_MAX_KERNELS: Final = 40  # rows of the table of kernels


def print_table(title: str, rows: list[Row], console: Console) -> None:
    """Return the figures of all engines as a table, followed by their notes and errors."""
    console.print(title, highlight=False)
    table = Table("", *(row["engine"] for row in rows))
    for column in table.columns[1:]:
        column.justify = "right"
    for key, label in _LINES.items():
        if any(key in row for row in rows):
            table.add_row(label, *(_text(row.get(key)) for row in rows))
    for row in rows:
        if "x_peer" in row:
            ratios = row["x_peer"]
            table.add_row(f"total / {row['engine']}", *(_text(ratios.get(other["engine"])) for other in rows))
    console.print(table)
    for row in rows:
        for key in ("note", "error"):
            if key in row:
                console.print(f"{row['engine']}: {row[key]}", markup=False, highlight=False)


def print_kernels(title: str, table: KernelTable, read_bytes_per_s: float, console: Console) -> None:
    """Print the kernels of a step with their share of the read rate, then their groups, and the step as a whole."""
    console.print(f"{title}: {table.note}", markup=False, highlight=False)
    columns = Table("", "kernel", "launches", "us", "MB", "% of the read rate")
    for column in columns.columns[2:]:
        column.justify = "right"

    def add(what: str, name: str, launches: str, us: float, num_bytes: float | None) -> None:
        share = num_bytes and us and 100 * num_bytes / (us * 1e-6) / read_bytes_per_s
        megabytes = "" if num_bytes is None else f"{num_bytes / 1e6:,.1f}"
        columns.add_row(what, name, launches, f"{us:,.1f}", megabytes, "" if share is None else f"{share:.0f}")

    for row in table.rows[:_MAX_KERNELS]:
        add("" if row.group == OTHER else row.what, short_name(row.name), f"{row.launches:.4g}", row.us, row.num_bytes)
    if rest := table.rows[_MAX_KERNELS:]:
        launches = sum(row.launches for row in rest)
        add("", f"{len(rest)} others", f"{launches:.4g}", sum(row.us for row in rest), None)
    columns.add_section()
    for row in table.groups:
        add(row.what, "", f"{row.launches:.4g}", row.us, row.num_bytes)
    known = [row.num_bytes for row in table.groups if row.num_bytes is not None]
    in_kernels_us = sum(row.us for row in table.groups)
    add("copies", "", "", max(0.0, table.busy_us - in_kernels_us), None)
    add("idle", "", "", table.step_us - table.busy_us, None)
    add("step, profiled", "", "", table.step_us, sum(known) if known else None)
    console.print(columns, markup=False, highlight=False)


def _text(value: Any) -> str:
    return "" if value is None else f"{value:,}"
