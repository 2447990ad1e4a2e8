"""Whether an engine without requests has returned to rest: nothing is held, and no descriptor is left over."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from pipeline import AsyncClient

Stats = Mapping[str, Mapping[str, float]]

# Counters that are 0 in an idle engine, by role.
_ZERO: Final = {
    "gateway": ("num_open", "num_waiting", "num_kept_bytes"),
    "scheduler": (
        "num_waiting", "num_waiting_tokens", "num_running", "num_preempted", "num_step_records", "num_result_records",
        "num_upload_records",
    ),
    "tokenizer": ("num_prompt_records",),
    "detokenizer": ("num_open",),
    "grammar": ("num_matchers",),
    "http": ("num_open_requests", "num_open_streams"),
}  # fmt: skip


def held(stats: Stats, max_num_seqs: int) -> list[str]:
    """What an engine holds that should hold nothing."""
    left = []
    for process, counters in stats.items():
        for name in _ZERO.get(process.partition(".")[0], ()):
            if counters[name]:
                left.append(f"{process}: {name} is {counters[name]:g}")
    scheduler = stats["scheduler"]
    if scheduler["num_free_rows"] != max_num_seqs:
        left.append(f"scheduler: {scheduler['num_free_rows']:g} of {max_num_seqs} rows are free")
    if scheduler["num_free_blocks"] != scheduler["num_blocks"]:
        left.append(f"scheduler: {scheduler['num_free_blocks']:g} of {scheduler['num_blocks']:g} blocks are free")
    return left


async def rest(client: AsyncClient, max_num_seqs: int, timeout_s: float = 30.0) -> list[str]:
    """Wait until nothing is held. Returns what still is after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while (left := held(await client.stats(), max_num_seqs)) and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    return left


@dataclass(frozen=True)
class Footprint:
    """What one process takes."""

    memory_bytes: int  # of its own: private pages
    descriptors: tuple[str, ...]  # what each open one is, sorted


def footprint(pid: int) -> Footprint:
    """Raises psutil.NoSuchProcess or OSError if the process has ended."""
    links = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            link = str(fd.readlink())
        except FileNotFoundError:  # closed meanwhile
            continue
        links.append(re.sub(r":\[.*|/ringfeed-[^/]*| \(deleted\)", "", link))  # numbers and names differ each time
    return Footprint(psutil.Process(pid).memory_full_info().uss, tuple(sorted(links)))


def footprints(pids: Mapping[str, int]) -> dict[str, Footprint]:
    """Of every process that lives."""
    found = {}
    for name, pid in pids.items():
        try:
            found[name] = footprint(pid)
        except (psutil.Error, OSError):
            continue
    return found
