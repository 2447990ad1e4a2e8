"""The `ringfeed` program: one argparse tree of all commands. Knows their names; a command's module knows its options.

A command's module has `add_arguments(parser)`, which also sets the default `run`: a function of the parsed options that
returns the exit status, or None for 0. The module is imported only when the command is used, so that `ringfeed --help`
is quick. `python -m pipeline.launch`, `.chat`, `.demo`, `.metrics`, `.bench`, `.keys`, `.recording` and `.timeline`
are the same commands.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.metadata
import sys
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, NoReturn

from pipeline.terminal.reporting import status_of

_PROGRAM: Final = "ringfeed"
_EXAMPLES: Final = """\
examples:
  ringfeed demo                                  a tour on the small model that comes with ringfeed
  ringfeed chat --model FOLDER_OR_HUB_ID         try a model in the terminal
  ringfeed serve --model FOLDER_OR_HUB_ID        run an engine; clients of this user find it
  ringfeed chat "What is a list?"                ask the running engine
  ringfeed metrics                               watch the running engine

`ringfeed COMMAND --help` describes a command. `ringfeed --config FILE` is `ringfeed serve --config FILE`.
"""


class _Command(NamedTuple):
    module: str
    summary: str


COMMANDS: Final = {
    "serve": _Command("pipeline.launch", "run an engine until it is told to end"),
    "chat": _Command("pipeline.chat", "talk to a model in the terminal or in a pipe"),
    "batch": _Command("pipeline.batch_file.command", "answer a file of requests, and go on where it stopped"),
    "demo": _Command("pipeline.demo", "tour: launch an engine, stream a chat, run a batch, show the figures"),
    "metrics": _Command("pipeline.metrics.watch", "show what a running engine does, live"),
    "bench": _Command("pipeline.bench.__main__", "measure ringfeed on this machine"),
    "keys": _Command(
        "pipeline.keys", "make the keys by which an engine and its clients on other machines know each other"
    ),
    "replay": _Command("pipeline.recording.__main__", "run recorded steps again, and compare every token"),
    "timeline": _Command("pipeline.timeline.__main__", "draw recorded timelines"),
}
_OWN_OPTIONS: Final = ("-h", "--help", "--version")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ringfeed ARGUMENTS` (default: those of this process) and return the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0].startswith("-") and given[0] not in _OWN_OPTIONS:
        given.insert(0, "serve")  # the program was `serve` alone before it had commands

    def run() -> int | None:
        parser = _parser(given)
        if not given:
            parser.print_help(sys.stderr)
            return 2
        options = parser.parse_args(given)
        result: int | None = options.run(options)
        return result

    return status_of(run)


def run_module(name: str, program: str, arguments: Sequence[str] | None = None) -> int:
    """Run one command as `python -m ...` does, where help calls it `program`. Returns the exit status."""

    def run() -> int | None:
        parser = Parser(prog=program)
        _complete(parser, name)
        options = parser.parse_args(arguments)
        result: int | None = options.run(options)
        return result

    return status_of(run)


class Parser(argparse.ArgumentParser):
    """A parser whose help shows defaults and keeps line breaks, and whose errors suggest the nearest valid name."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_HelpFormatter, **options)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            nearest = difflib.get_close_matches(str(value), map(str, action.choices or ()), n=1)
            if nearest:
                error.message += f": did you mean {nearest[0]}?"
            raise

    def error(self, message: str) -> NoReturn:
        """Say in one line what is wrong and where help is. Exit status 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        is_shown = default is not None and default is not False and default not in (argparse.SUPPRESS, [])
        if text is None or not is_shown or not action.option_strings or "default" in text:
            return text
        if isinstance(default, list):
            default = ",".join(map(str, default))
        return f"{text} (default: {str(default).replace('%', '%%')})"


def _parser(given: Sequence[str]) -> Parser:
    parser = Parser(
        prog=_PROGRAM, description="An LLM inference engine whose GPU never waits for a CPU.", epilog=_EXAMPLES
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.summary)
        if name in given:
            _complete(subparser, name)
    return parser


def _complete(parser: Parser, name: str) -> None:
    command = COMMANDS[name]
    parser.description = f"{command.summary[0].upper()}{command.summary[1:]}."
    importlib.import_module(command.module).add_arguments(parser)


class _Version(argparse.Action):
    """Looks the version up only if it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        try:
            version = importlib.metadata.version(_PROGRAM)
        except importlib.metadata.PackageNotFoundError:
            version = "(not installed: run from its source)"
        print(f"{_PROGRAM} {version}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
