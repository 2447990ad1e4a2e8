"""`python -m pipeline.launch --config FILE`: check all that can be checked, then run one engine until told to end.

Exit status: 0 after an orderly end, 1 after a failure, 2 for a configuration that cannot work, 128 + signal if
stopped at once.
"""

from __future__ import annotations

import argparse
import errno
import io
import logging
import os
import secrets
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import Final

import msgspec

from ipc.block_hash import SEED_BYTES
from ipc.errors import ConfigError, RingfeedError
from pipeline.client.endpoint import PATIENCE_S, EndpointClaim, default_endpoint, runtime_folder
from pipeline.engine.announcer import Announcer
from pipeline.engine.config import BAD_CONFIG_STATUS, Config, find_origin, load_config, to_toml
from pipeline.engine.model_files import ModelNotHere, ServedModel, check_device, find_model
from pipeline.engine.role_settings import EngineFacts
from pipeline.engine.shared_resources import SharedResources
from pipeline.engine.signals import signal_pipe
from pipeline.engine.supervisor import Supervisor
from pipeline.engine.topology import ENDPOINT_CLAIM, ENGINE, Table
from pipeline.engine.wiring import Wiring
from pipeline.environment.descriptors import check_room, raise_descriptor_limit
from pipeline.terminal.reporting import print_error, status_of
from pipeline.timeline.recorder import Recorder
from workers.process import LOG_FORMAT

logger = logging.getLogger(__name__)

# Descriptors of the engine's process that needs most, with room for a few clients; and those that a tokenizer adds.
_NUM_DESCRIPTORS: Final = 160
_NUM_PER_TOKENIZER: Final = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit status."""
    _open_closed_streams()
    raise_descriptor_limit()
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=options.log_level, format=LOG_FORMAT.format(role="launcher"), stream=sys.stderr)
    for noisy in ("httpx", "httpcore", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        config = load_config(options.config, options.set)
        try:
            if options.check:
                return _print_resolved(config)
            return launch(
                config, log_level=options.log_level, status_fd=options.status_fd, lifeline_fd=options.lifeline_fd,
                timeline=options.timeline,
            )  # fmt: skip
        except ConfigError as error:
            raise ConfigError(f"{find_origin(str(error), options.config, options.set)}: {error}") from None
    except ConfigError as error:
        print_error(error)
        return BAD_CONFIG_STATUS
    except RingfeedError as error:
        print_error(error)
        return 1
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ETOOMANYREFS):
            raise
        print_error(f"{error.strerror}: raise the limit (ulimit -n)")
        return 1
    except KeyboardInterrupt:  # before the supervisor took the signals over: nothing runs yet
        return 130


def launch(
    config: Config,
    *,
    log_level: str = "INFO",
    status_fd: int | None = None,
    lifeline_fd: int | None = None,
    timeline: str | os.PathLike[str] | None = None,
    table: Table = ENGINE,
) -> int:
    """Run an engine until it is told to end, and return the exit status. Call it in the main thread.

    `timeline`: a file for a trace of all that the processes do. `table` declares the processes.
    Raises ConfigError before anything is spawned.
    """
    check_room(_NUM_DESCRIPTORS + _NUM_PER_TOKENIZER * config.tokenizer.num_workers, "this engine")
    check_device(config.model.device)
    model = find_model(config)
    endpoint = config.frontend.endpoint or default_endpoint()
    with signal_pipe() as signal_fd, closing(EndpointClaim(endpoint, PATIENCE_S)) as claim, ExitStack() as stack:
        recorder = None if timeline is None else stack.enter_context(Recorder(timeline))
        facts = EngineFacts(
            config=config,
            model=model,
            endpoint=endpoint,
            run_folder=runtime_folder() / f"ringfeed-run-{secrets.token_hex(4)}",
            launcher_pid=os.getpid(),
            log_level=log_level,
            traced=recorder is not None,
            cache_seed=secrets.token_bytes(SEED_BYTES) if config.cache.prefix_caching else None,
            lent={} if claim.fd is None else {ENDPOINT_CLAIM: claim.fd},
        )
        wiring = Wiring(table, facts)
        resources = stack.enter_context(closing(SharedResources(wiring)))  # the supervisor closes it first
        if recorder is not None:
            recorder.start(resources.traces, _label(config, model))
        supervisor = Supervisor(
            wiring,
            resources,
            Announcer(endpoint, model.name, _details(config, model), status_fd),
            drain_timeout_s=config.frontend.drain_timeout_s,
            signal_fd=signal_fd,
            lifeline_fd=lifeline_fd,
        )
        return supervisor.run()


def _details(config: Config, model: ServedModel) -> str:
    return (
        f"{config.cache.block_size} tokens each, {config.scheduler.max_num_seqs} sequences of up to "
        f"{model.max_model_len} tokens, ring depth {config.ring.depth}"
    )


def _label(config: Config, model: ServedModel) -> str:
    """What a timeline says of its engine."""
    is_null, depth = config.model.load_format == "null", config.ring.depth
    name = f"no model, steps of {config.model.null_step_ms:g} ms" if is_null else model.name
    return f"{name}, ring.depth {depth}{' (synchronous)' if depth == 1 else ''}"


def _print_resolved(config: Config) -> int:
    """Print the configuration as it would run, and return the exit status.

    What this machine lacks is noted: a configuration may be checked where it is written. A model that is not here yet
    leaves its own values open.
    """
    try:
        check_device(config.model.device)
    except ConfigError as error:
        print(f"note: {error}", file=sys.stderr)
    try:
        model = find_model(config, download=False)
    except ModelNotHere as error:
        print(f"note: {error}; it is not checked", file=sys.stderr)
    else:
        config = msgspec.structs.replace(
            config, scheduler=msgspec.structs.replace(config.scheduler, max_model_len=model.max_model_len)
        )
    endpoint = config.frontend.endpoint or default_endpoint()
    config = msgspec.structs.replace(config, frontend=msgspec.structs.replace(config.frontend, endpoint=endpoint))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # TOML is, whatever the terminal's encoding
    return status_of(lambda: print(to_toml(config)))


def _open_closed_streams() -> None:
    """A standard stream that we were started without would be None, and its descriptor the next file's to take."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            fd = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(fd, True)  # the workers' as well
            setattr(sys, name, os.fdopen(fd, mode))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ringfeed", description="Run a ringfeed engine.")
    parser.add_argument("--config", required=True, metavar="FILE", help='TOML file; "-" = standard input')
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one key")
    parser.add_argument("--check", action="store_true", help="check and print the resolved configuration, run nothing")
    parser.add_argument("--log-level", default="INFO", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    parser.add_argument(
        "--timeline",
        metavar="FILE",
        help="write a trace for ui.perfetto.dev of all processes and the device (.gz: packed)",
    )
    parser.add_argument("--status-fd", type=_descriptor, help="write life events to this descriptor, one JSON a line")
    parser.add_argument("--lifeline-fd", type=_descriptor, help="end soon after this descriptor's other end is closed")
    return parser


def _descriptor(text: str) -> int:
    """An inherited descriptor that our own children shall not have."""
    fd = int(text)
    os.set_inheritable(fd, False)
    return fd


if __name__ == "__main__":
    sys.exit(main())
