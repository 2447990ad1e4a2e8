"""`ringfeed metrics`: a running engine's gauges, live: one row for each process, and the device's time by cause.

It only calls `client.stats()`: the engine does nothing else for it.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.cli import run_module
from pipeline.client.sync_client import Client
from pipeline.metrics.figures import DeviceTime, Figures, Roles, Window
from pipeline.terminal.engine_options import add_endpoint_options

_BAR_CELLS: Final = 50
_STYLES: Final = {
    "busy": "green",
    "no work": "bright_black",
    "scheduler": "red",
    "copies": "yellow",
    "masks": "magenta",
}

_EXAMPLES: Final = """\
examples:
  ringfeed metrics
  ringfeed metrics --endpoint tcp://127.0.0.1:5757 --interval 5
  ringfeed metrics --count 1 | cat                 one reading, as plain text
"""

# The columns of a role's row: its gauges now, and its counters per second.
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


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m pipeline.metrics`. Returns the exit status."""
    return run_module("metrics", "python -m pipeline.metrics", arguments)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ringfeed metrics`."""
    parser.description = (
        "Show a running engine's gauges until Ctrl-C: one row for each process, and the device's time by cause."
    )
    parser.epilog = _EXAMPLES
    parser.set_defaults(run=run)
    add_endpoint_options(parser)
    parser.add_argument("--interval", type=_interval, default=1.0, metavar="S", help="seconds between two readings")
    parser.add_argument("--count", type=_count, metavar="N", help="end after N readings (default: no end)")


def run(options: argparse.Namespace) -> None:
    """Show the engine's gauges. Raises RingfeedError."""
    try:
        with Client(options.endpoint, key_file=options.key_file) as client, Live(auto_refresh=False) as live:
            watch(client.stats, lambda view: live.update(view, refresh=True), options.interval, options.count)
    except KeyboardInterrupt:
        return  # the usual end: exit status 0


def watch(read: Callable[[], Roles], show: Callable[[Group], None], interval_s: float, count: int | None) -> None:
    """Show a view of each interval between two readings, `count` times (None = no end).

    An interval in which the engine was restarted is not shown.
    """
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
    """Whether the second reading is of another engine: its processes differ, or a counter is lower."""
    return before.keys() != now.keys() or any(
        now[role][name] < before[role][name] for role in now for name in ("cpu_ns", *_RATES.get(role.split(".")[0], ()))
    )


def view(before: Roles, now: Roles, figures: Figures) -> Group:
    """The table of processes and, below it, the bar of the device's time."""
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
    """A bar of the device's time with the share of every part, or the reason why no bar can be drawn."""
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
