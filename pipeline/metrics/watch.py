"""`python -m pipeline.metrics`: a running engine's gauges, live, one row a process and the device's time by cause.

Reads `client.stats()` alone: the engine does not know that anybody looks.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable
from typing import Final

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ipc.errors import RingfeedError
from pipeline.client.sync_client import Client
from pipeline.metrics.figures import DeviceTime, Figures, Roles, Window
from pipeline.terminal.reporting import print_error

_BAR_CELLS: Final = 50
_STYLES: Final = {"busy": "green", "no work": "bright_black", "scheduler": "red", "copies": "yellow"}

# What a role's row says: its gauges now, and its counters per second.
_GAUGES: Final[dict[str, tuple[str, ...]]] = {
    "gateway": ("num_open", "num_waiting", "num_clients", "num_connections"),
    "tokenizer": ("num_prompt_records",),
    "detokenizer": ("num_open", "num_undelivered"),
    "scheduler": (
        "num_running", "num_waiting", "num_preempted", "num_free_blocks", "num_free_rows",
        "num_step_records", "num_result_records", "num_upload_records",
    ),
}  # fmt: skip
_RATES: Final[dict[str, tuple[str, ...]]] = {
    "gateway": ("num_received", "num_finished"),
    "tokenizer": ("num_requests", "num_tokens"),
    "detokenizer": ("num_outputs",),
    "scheduler": ("num_steps", "num_sampled_tokens", "num_prompt_tokens"),
    "gpu": ("num_steps",),
}


def main() -> int:
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.metrics", description="Show a running engine's gauges, until Ctrl-C."
    )
    parser.add_argument("--endpoint", help="the engine's; without it, this user's default one")
    parser.add_argument("--interval", type=_interval, default=1.0, metavar="S", help="seconds between two readings")
    parser.add_argument("--count", type=_count, metavar="N", help="end after so many readings")
    arguments = parser.parse_args()
    try:
        with Client(arguments.endpoint) as client, Live(auto_refresh=False) as live:
            watch(client.stats, lambda view: live.update(view, refresh=True), arguments.interval, arguments.count)
    except KeyboardInterrupt:
        return 0
    except RingfeedError as error:
        print_error(error)
        return 1
    return 0


def watch(read: Callable[[], Roles], show: Callable[[Group], None], interval_s: float, count: int | None) -> None:
    """Show a view of every interval between two readings of one engine, `count` times (None = without end)."""
    before, num_shown = read(), 0
    while count is None or num_shown < count:
        window = Window(before)
        time.sleep(interval_s)
        now = read()
        if not _is_restarted(before, now):
            show(view(before, now, window.close(now)))
            num_shown += 1
        before = now


def _is_restarted(before: Roles, now: Roles) -> bool:
    """Whether another engine has answered: one with other processes, or whose counters are behind."""
    return before.keys() != now.keys() or any(
        now[role][name] < before[role][name] for role in now for name in ("cpu_ns", *_RATES.get(role.split(".")[0], ()))
    )


def view(before: Roles, now: Roles, figures: Figures) -> Group:
    """The table and, below it, where the device's time went."""
    table = Table("process", "CPU", "now", "per second", title=f"{figures.tokens_per_s:,.0f} tokens/s")
    for role, counters in now.items():
        kind = role.split(".")[0]
        gauges = [f"{_title(name)} {counters[name]:,.0f}" for name in _GAUGES.get(kind, ())]
        rates = [
            f"{_title(name)} {(counters[name] - before[role][name]) / figures.seconds:,.0f}"
            for name in _RATES.get(kind, ())
        ]
        cpu = (counters["cpu_ns"] - before[role]["cpu_ns"]) / 1e9 / figures.seconds
        table.add_row(role, f"{cpu:.0%}", ", ".join(gauges), ", ".join(rates))
    has_work = now["scheduler"]["num_running"] + now["scheduler"]["num_waiting"] > 0
    return Group(table, device_line(figures.device, has_work))


def device_line(device: DeviceTime, has_work: bool) -> Text:
    """A bar of the device's time with the share of every part, or why there is none."""
    if not device.is_known:
        return Text("device: no step ended" if has_work else "device: idle, no work", "bright_black")
    line, legend = Text("device "), Text("       ")
    shares = device.shares()
    cell = "█" if (sys.stdout.encoding or "").lower().startswith("utf") else "#"
    end = num_cells = 0
    cumulated = 0.0
    for name, share in shares.items():
        cumulated += share
        end = round(cumulated * _BAR_CELLS)
        line.append(cell * (end - num_cells), _STYLES[name])
        num_cells = end
        legend.append(f"{name} {share:.2%}   ", _STYLES[name])
    line.append(f"  idle {1 - shares['busy']:.2%}\n")
    return line.append_text(legend)


def _interval(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < threading.TIMEOUT_MAX:
        raise argparse.ArgumentTypeError(f"{text} must be a number of seconds above 0")
    return seconds


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return count


def _title(name: str) -> str:
    return name.removeprefix("num_").replace("_", " ")
