"""Command-line options that choose the engine of a command: a configuration file or a model, and changes to it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ipc.errors import ConfigError


def add_engine_options(parser: argparse.ArgumentParser, default: Path | None = None) -> None:
    """Add `--config`, `--model` and `--set`. `default` is the configuration of a command that is given neither."""
    group = parser.add_argument_group("the engine")
    shown = f" (default: {default.name} of ringfeed's small model)" if default else ""
    group.add_argument("--config", metavar="FILE", help=f'TOML file; "-" = standard input{shown}')
    group.add_argument(
        "--model", metavar="PATH_OR_HUB_ID",
        help="instead of --config: a model's folder, seen from the current folder, or its Hugging Face hub id; every "
        "other key has its default (device, dtype and threads chosen for this machine)",
    )  # fmt: skip
    group.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE",
        help="change one key, for example scheduler.max_num_seqs=64; may be repeated. A relative model.path starts at "
        "the current folder. With --config, model.path=... changes the model alone: it keeps the file's device, "
        "dtype and threads (configs/tiny.toml: CPU, float32, one thread)",
    )  # fmt: skip


def add_endpoint_options(parser: argparse.ArgumentParser) -> None:
    """Add `--endpoint` and `--key-file`, which choose a running engine."""
    parser.add_argument("--endpoint", help="where the running engine listens (default: this user's default endpoint)")
    parser.add_argument(
        "--key-file", metavar="FILE",
        help="this client's keys for a tcp:// endpoint, made by `ringfeed keys` (default: $RINGFEED_KEY_FILE)",
    )  # fmt: skip


def check_engine_options(options: argparse.Namespace, *, required: bool) -> None:
    """Raise ConfigError for options that exclude each other, or for none of them where one is `required`."""
    if options.config is not None and options.model is not None:
        raise ConfigError(
            f"--config {options.config} and --model {options.model} are both given: give one; to run another model "
            "with a file's settings, give --config FILE --set model.path=MODEL"
        )
    if required and options.config is None and options.model is None:
        raise ConfigError("give a configuration, --config FILE, or a model, --model PATH_OR_HUB_ID")


def pipeline_arguments(options: argparse.Namespace, default: Path | None = None) -> dict[str, Any]:
    """The arguments of a `Pipeline` for these options. Raises ConfigError."""
    check_engine_options(options, required=default is None)
    if options.model is not None:
        return {"model": options.model, "overrides": options.set}
    return {"config": options.config or default, "overrides": options.set}
