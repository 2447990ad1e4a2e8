"""`ringfeed timeline FILE [FILE ...] -o PICTURE`: draw a window of recorded timelines."""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Sequence
from typing import Final

from ipc.errors import ConfigError
from pipeline.cli import run_module
from pipeline.timeline.reader import load_timeline

_EXAMPLES: Final = """\
examples:
  ringfeed serve --config FILE --timeline run.json.gz      record a timeline
  ringfeed timeline run.json.gz -o run.svg                 draw some steps from its middle
  ringfeed timeline a.json.gz b.json.gz --window 2,0.05 -o compare.png

Drawing needs matplotlib: pip install 'ringfeed[plot]'. ui.perfetto.dev shows a whole timeline.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m pipeline.timeline`. Returns the exit status."""
    return run_module("timeline", "python -m pipeline.timeline", arguments)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ringfeed timeline`."""
    parser.description = "Draw a window of recorded timelines, one above the other."
    parser.epilog = _EXAMPLES
    parser.set_defaults(run=run)
    parser.add_argument("files", nargs="+", metavar="FILE", help="from `ringfeed serve --timeline`; the first on top")
    parser.add_argument("-o", "--output", required=True, metavar="PICTURE", help="ends in .svg, .png or .pdf")
    parser.add_argument(
        "--window", type=_window, metavar="START_S,LENGTH_S",
        help="seconds after the first step on the device, and length in seconds (default: some steps from the middle)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Draw the picture. Raises ConfigError for files or options that cannot work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("drawing needs matplotlib: pip install 'ringfeed[plot]'")
    from pipeline.timeline.picture import Window, draw

    window = None if options.window is None else Window(*options.window)
    draw([load_timeline(path) for path in options.files], window, options.output)


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
    sys.exit(main())
