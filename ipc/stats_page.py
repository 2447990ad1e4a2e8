"""Counters that any process may read and one writes: a page of shared 64-bit integers per worker.

Updating one is a memory store: it costs the writer nothing and asks nobody. To add a metric: a name in `FIELDS`, and
the line that counts. Names end in `_ns` for durations; all others are counts, and a gauge says so by its `num_` now.
The reader gets CPU time from the kernel, so a writer that is too busy to update its page still shows its CPU time.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any, Final

import msgspec

from ipc.record_layout import Layout
from ipc.shared_memory import create_segment, map_segment

# The writer's pid; its wake-ups from poll; garbage collections since it was loaded; objects in cycles that they found.
_COMMON: Final = ("pid", "num_wakeups", "num_collections", "num_garbage")

FIELDS: Final[dict[str, tuple[str, ...]]] = {
    "gateway": (
        "num_open", "num_received", "num_refused", "num_finished", "num_cancelled", "num_clients",
        # Like the scheduler's counters, for requests that have not reached it: those that wait for a tokenizer, those
        # refused because something was full, and those that ran out of time.
        "num_waiting", "num_queue_full", "num_deadline", "num_queue_timeout",
        "num_connections", "num_connections_refused",
    ),
    "tokenizer": ("num_requests", "num_tokens", "num_rejected", "encode_ns", "num_prompt_records"),
    "detokenizer": ("num_open", "num_tokens", "num_outputs", "num_finished", "num_undelivered"),
    "scheduler": (
        "num_waiting", "num_waiting_tokens", "num_running", "num_preempted", "num_blocks", "num_free_blocks",
        "num_free_rows",
        # What the rings hold, as "num_prompt_records" does of a tokenizer's: records that are not released. One of the
        # result ring counts from its step's publishing on: it is kept for that step.
        "num_step_records", "num_result_records", "num_upload_records",
        "num_steps",
        "num_prefill_steps",  # those that compute prompts, with or without sequences that decode beside them
        "num_sampled_tokens", "num_prompt_tokens", "num_admitted", "num_finished", "num_cancelled",
        "num_refused", "num_queue_full", "num_deadline", "num_queue_timeout", "num_not_finite",
        "num_preemptions", "num_cached_tokens",
        "num_cached_blocks", "plan_ns", "apply_ns",
        # The device, busy or idle and why, from the result records (workers/scheduler/results/device_time.py).
        "device_busy_ns", "device_no_work_ns", "device_scheduler_ns", "device_copies_ns", "device_last_end_ns",
    ),
    "gpu": ("num_steps", "launch_ns", "num_rows", "load_ns"),
}  # fmt: skip


class StatsHandle(msgspec.Struct, frozen=True):
    """One worker's page: `role` is "gateway", "tokenizer.0", ..."""

    role: str
    fd: int


class StatsPage:
    """A mapped page; `values.<field>[0]` reads or, in its one writer, writes a counter."""

    def __init__(self, handle: StatsHandle) -> None:
        self.role = handle.role
        self.layout = stats_layout(handle.role)
        self._map = map_segment(handle.fd)
        self.values: Any = self.layout.views(memoryview(self._map))
        self._cpu_ns = 0

    @staticmethod
    def create(role: str) -> StatsHandle:
        return StatsHandle(role, create_segment(f"ringfeed-stats-{role}", stats_layout(role).num_bytes))

    def snapshot(self) -> dict[str, float]:
        """All counters, and `cpu_ns`, the CPU time of the process that writes them."""
        values = {name: float(getattr(self.values, name)[0]) for name in self.layout.fields}
        if pid := int(values.pop("pid")):
            with contextlib.suppress(OSError):  # it has ended
                self._cpu_ns = time.clock_gettime_ns(_cpu_clock(pid))
        return {"cpu_ns": float(self._cpu_ns), **values}


def stats_layout(role: str) -> Layout:
    """The layout of a role's page; "tokenizer.1" has that of "tokenizer"."""
    return Layout(f"stats.{role}", [(name, "<i8", (1,)) for name in (*_COMMON, *FIELDS[role.split(".")[0]])])


def _cpu_clock(pid: int) -> int:
    """What clock_getcpuclockid(3) gives for a process."""
    return (~pid << 3) | 2
