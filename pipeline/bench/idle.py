"""Measures the share of a core that each process of an idle engine uses.

CPU time comes from the kernel (/proc/PID/stat), so it includes time that a process does not count itself.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from pipeline import Pipeline, SamplingParams
from pipeline.bench.arguments import positive
from pipeline.engine.small_model import CONFIG

SETTLE_S: Final = 3.0  # after the last request
_TICK_S: Final = 1.0 / os.sysconf("SC_CLK_TCK")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=CONFIG, metavar="FILE", help="the engine")
    parser.add_argument("--seconds", type=positive, default=20.0, help="length of the measurement")
    parser.add_argument("--json", action="store_true", help="print a JSON line instead of a table")


def run(arguments: argparse.Namespace) -> None:
    shares = measure(arguments.config, arguments.seconds)
    shares["together"] = sum(shares.values())
    if arguments.json:
        print(json.dumps({role: round(share, 5) for role, share in shares.items()}))
        return
    table = Table("process", "share of a core", title=f"idle for {arguments.seconds:g} s, one client connected")
    for role, share in shares.items():
        table.add_row(role, f"{share:.2%}")
    Console().print(table)


def measure(config: Path, seconds: float) -> dict[str, float]:
    """Return the share of one core by process, over `seconds`, after a request has been served."""
    with Pipeline(config) as pipeline:
        pipeline.client.generate("A module is", SamplingParams(max_tokens=8))
        time.sleep(SETTLE_S)
        before = {role: cpu_s(pid) for role, pid in pipeline.pids.items()}
        time.sleep(seconds)
        return {role: (cpu_s(pid) - before[role]) / seconds for role, pid in pipeline.pids.items()}


def cpu_s(pid: int) -> float:
    """Return the CPU seconds (user and system) that all threads of a process have used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S
