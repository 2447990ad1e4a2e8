"""Command line of the benchmarks: one subcommand for each module."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Final

from pipeline.bench import grammar, host, http, idle, overload, prefix, restart, scheduler, throughput
from pipeline.cli import run_module

_EXAMPLES: Final = """\
examples:
  ringfeed bench host                          what the host spends on a step, with a simulated device
  ringfeed bench throughput --config FILE      an engine beside the rates of its device
  ringfeed bench throughput --config FILE --peers transformers-async,vllm
  ringfeed bench restart --config FILE         how long streams pause when the GPU process dies

`ringfeed bench NAME --help` describes a benchmark.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m pipeline.bench`. Returns the exit status: 2 for arguments that cannot work."""
    return run_module("bench", "python -m pipeline.bench", arguments)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a subcommand for each benchmark."""
    parser.epilog = _EXAMPLES
    commands = parser.add_subparsers(required=True, metavar="NAME", title="benchmarks")
    for module in (grammar, host, http, idle, overload, prefix, restart, scheduler, throughput):
        name = module.__name__.rpartition(".")[2]
        text = module.__doc__ or ""
        command = commands.add_parser(name, help=text.splitlines()[0], description=text)
        module.add_arguments(command)
        command.set_defaults(run=module.run)


if __name__ == "__main__":
    sys.exit(main())
