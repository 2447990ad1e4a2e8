"""Command line of the benchmarks: one subcommand per module."""

from __future__ import annotations

import argparse
import sys

from ipc.errors import ConfigError, InvalidRequest
from pipeline.bench import host, idle, overload, prefix, scheduler, throughput
from pipeline.terminal.reporting import print_error, run_command


def main() -> None:
    """Run one benchmark. Returns its exit status, or 2 for an error that the user can correct."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.bench", description="Measure ringfeed.")
    commands = parser.add_subparsers(required=True, metavar="NAME")
    for module in (host, idle, overload, prefix, scheduler, throughput):
        name = module.__name__.rpartition(".")[2]
        summary = (module.__doc__ or "").splitlines()[0]
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    arguments = parser.parse_args()
    try:
        arguments.run(arguments)
    except (ConfigError, InvalidRequest) as error:
        print_error(error)
        sys.exit(2)


if __name__ == "__main__":
    run_command(main)
