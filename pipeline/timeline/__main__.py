"""`python -m pipeline.timeline FILE [FILE ...] -o PICTURE`: draw a window of recorded timelines."""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Sequence

from ipc.errors import ConfigError
from pipeline.terminal.reporting import print_error, run_command
from pipeline.timeline.reader import load_timeline


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 2 for an error that the user can correct."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.timeline", description="Draw recorded timelines.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="of `pipeline.launch --timeline`; the first on top")
    parser.add_argument("-o", "--output", required=True, metavar="PICTURE", help="ends in .svg, .png or .pdf")
    parser.add_argument(
        "--window", type=_window, metavar="START_S,LENGTH_S",
        help="seconds from the first step on the device, and how many; without it, some steps from the middle",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        if importlib.util.find_spec("matplotlib") is None:
            raise ConfigError("drawing needs matplotlib: pip install 'ringfeed[plot]'")
        from pipeline.timeline.picture import Window, draw

        window = None if options.window is None else Window(*options.window)
        draw([load_timeline(path) for path in options.files], window, options.output)
    except ConfigError as error:
        print_error(error)
        return 2
    return 0


def _window(text: str) -> tuple[float, float]:
    start, _, length = text.partition(",")
    try:
        start_s, length_s = float(start), float(length)
    except ValueError:
        start_s = length_s = -1.0
    if not (0 <= start_s < math.inf and 0 < length_s < math.inf):
        raise argparse.ArgumentTypeError(f"{text!r} must be two numbers of seconds, START_S >= 0 and LENGTH_S > 0")
    return start_s, length_s


if __name__ == "__main__":
    run_command(main)
