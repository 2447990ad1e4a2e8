"""Command-line arguments that several benchmarks have, and types that refuse unusable values before anything is run."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pipeline.engine.small_model import CONFIG

N = TypeVar("N", int, float)


def add_engine(parser: argparse.ArgumentParser, default: Path | None = CONFIG) -> None:
    """Add `--config`, which is required if there is no default, and `--set`, whose values are `overrides`."""
    parser.add_argument(
        "--config", type=Path, default=default, required=default is None, metavar="FILE", help="the engine"
    )
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE",
        help="change one key of the configuration; may be repeated",
    )  # fmt: skip


def positive(text: str) -> float:
    """A number above 0, of seconds or times."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a number above 0")
    return number


def comma_separated(kind: type[N]) -> Callable[[str], list[N]]:
    """One number or several."""

    def numbers(text: str) -> list[N]:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} must be numbers, separated by commas") from None

    return numbers


def made_folder(text: str) -> Path:
    """A folder to write to. It is created if it does not exist."""
    folder = Path(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"the folder {text} cannot be created: {error.strerror}") from None
    return folder
