"""`ringfeed replay FILE`: run recorded steps again, and compare every token.

Exit status: 0 if everything is the same, 1 if something differs, 2 if the file or the model cannot be used.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Final

from pipeline.cli import run_module
from pipeline.recording.comparison import Comparison

_EXAMPLES: Final = """\
examples:
  ringfeed serve --config FILE --record run.steps     record every step of the GPU process
  ringfeed replay run.steps                           run them again, on this machine
  ringfeed replay run.steps --model FOLDER --device cpu

FILE holds prompts and answers as token ids: give it only to people who may read them.

Exit status: 0 if every result is the same, bit for bit; 1 if one differs; 2 if the file or the model cannot be used.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m pipeline.recording`. Returns the exit status."""
    return run_module("replay", "python -m pipeline.recording", arguments)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ringfeed replay`."""
    parser.epilog = _EXAMPLES
    parser.set_defaults(run=run)
    parser.add_argument("file", metavar="FILE", help="from `ringfeed serve --record FILE`")
    parser.add_argument("--model", metavar="FOLDER", help="the same model on this machine (default: where it was)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: as configured when it was recorded")


def run(options: argparse.Namespace) -> int:
    """Replay, and print what was found. Raises ConfigError for files and models that cannot be used."""
    from pipeline.recording.replay import replay

    begun_s = time.monotonic()
    found = replay(options.file, model=options.model, device=options.device)
    for note in found.notes:
        print(f"note: {note}")
    print(f"{verdict(found.comparison)} ({time.monotonic() - begun_s:.1f} s)")
    return 0 if found.comparison.is_same else 1


def verdict(comparison: Comparison) -> str:
    """One line if everything is the same, else two."""
    c = comparison
    values = f"{c.num_tokens} tokens" + (f" and {c.num_logprobs} log-probabilities" if c.num_logprobs else "")
    if c.is_same:
        return f"all {values} of {c.num_steps} steps are the same, bit for bit"
    logprobs = f" and {c.num_different_logprobs} log-probability fields" if c.num_different_logprobs else ""
    return (
        f"{c.first}\n"
        f"{c.num_different_tokens} tokens{logprobs} differ, in {len(c.different_steps)} of {c.num_steps} steps and "
        f"{len(c.different_sequences)} of {c.num_sequences} sequences (of {values})"
    )


if __name__ == "__main__":
    sys.exit(main())
