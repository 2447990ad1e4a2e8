"""`ringfeed serve` and `python -m pipeline.launch`: check the configuration, then run one engine until told to end.

Exit status: 0 after an orderly end, 1 after a failure, 2 for a configuration that cannot work, 128 + signal if it was
stopped at once.
"""

from __future__ import annotations

import argparse
import errno
import io
import logging
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any, Final

import msgspec

from ipc.block_hash import SEED_BYTES
from ipc.errors import ConfigError, EngineUnavailable
from pipeline.cli import run_module
from pipeline.client.endpoint import PATIENCE_S, EndpointClaim, default_endpoint, runtime_folder
from pipeline.engine.announcer import Announcer, HttpFront
from pipeline.engine.config import Config, config_from_dict, find_origin, load_config, to_toml
from pipeline.engine.model_files import ModelNotHere, ServedModel, check_device, find_model
from pipeline.engine.role_settings import EngineFacts
from pipeline.engine.shared_resources import SharedResources
from pipeline.engine.signals import signal_pipe
from pipeline.engine.supervisor import Supervisor
from pipeline.engine.topology import ENDPOINT_CLAIM, ENGINE, Table
from pipeline.engine.wiring import Wiring
from pipeline.environment.descriptors import check_room, raise_descriptor_limit
from pipeline.http.config import HTTP_LISTENER, HttpConfig
from pipeline.http.listener import open_listener, read_keys, url_of
from pipeline.http.parsing.choose import choose_format, read_chat_template
from pipeline.recording.file import DEFAULT_RECORD_LIMIT_GB, recording_file
from pipeline.terminal.engine_options import add_engine_options, check_engine_options
from pipeline.timeline.recorder import Recorder
from workers.gateway.client_keys import check_key_files
from workers.gpu.config import RECORDING
from workers.process import LOG_FORMAT

logger = logging.getLogger(__name__)

# Descriptors of the engine's process that needs most, with room for a few clients; and those that each tokenizer or
# grammar process adds.
_NUM_DESCRIPTORS: Final = 160
_NUM_PER_WORKER: Final = 8
_NOISY_LOGGERS: Final = ("httpx", "httpcore", "httpx2", "httpcore2", "huggingface_hub")
_EXAMPLES: Final = """\
examples:
  ringfeed serve --model FOLDER_OR_HUB_ID
  ringfeed serve --model FOLDER_OR_HUB_ID --set frontend.endpoint=tcp://127.0.0.1:5757
  ringfeed serve --config engine.toml --set scheduler.max_num_seqs=64
  ringfeed serve --model FOLDER_OR_HUB_ID --check > engine.toml    every key with its value, to edit

SIGTERM or Ctrl-C lets open requests finish; a second one stops the engine at once.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m pipeline.launch`. Returns the exit status."""
    return run_module("serve", "python -m pipeline.launch", arguments)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ringfeed serve`."""
    parser.epilog = _EXAMPLES
    parser.set_defaults(run=run)
    add_engine_options(parser)
    parser.add_argument(
        "--no-http", action="store_true", help="with --model: no HTTP server; only ringfeed's own clients can connect"
    )
    parser.add_argument("--check", action="store_true", help="check and print the resolved configuration, run nothing")
    parser.add_argument(
        "--log-level", default="INFO", choices=("DEBUG", "INFO", "WARNING", "ERROR"), help="of standard error"
    )
    parser.add_argument(
        "--timeline", metavar="FILE",
        help="write a trace of all processes and the device for ui.perfetto.dev (compressed if FILE ends in .gz)",
    )  # fmt: skip
    parser.add_argument(
        "--record", metavar="FILE",
        help="write every step with its prompts and results for `ringfeed replay FILE`; FILE holds what users write",
    )  # fmt: skip
    parser.add_argument(
        "--record-limit", type=_gigabytes, default=DEFAULT_RECORD_LIMIT_GB, metavar="GB",
        help="the recording ends when FILE is that large",
    )  # fmt: skip
    programs = parser.add_argument_group("for programs that start an engine")
    programs.add_argument(
        "--status-fd", type=_descriptor, metavar="FD", help="write start-up events to this descriptor, one JSON a line"
    )
    programs.add_argument(
        "--lifeline-fd", type=_descriptor, metavar="FD", help="end soon after this descriptor's other end is closed"
    )


def run(options: argparse.Namespace) -> int:
    """Check, print or run the engine of these options, and return the exit status. Raises RingfeedError."""
    raise_descriptor_limit()
    logging.basicConfig(level=options.log_level, format=LOG_FORMAT.format(role="launcher"), stream=sys.stderr)
    for noisy in _NOISY_LOGGERS:
        logging.getLogger(noisy).setLevel(logging.WARNING)
    check_engine_options(options, required=True)
    if options.model is None:
        source, config = options.config, load_config(options.config, options.set)
    else:
        source = f"--model {options.model}"
        given: dict[str, Any] = {"model": {"path": options.model}} | ({} if options.no_http else {"http": {}})
        config = config_from_dict(given, source, overrides=options.set)
    try:
        if options.check:
            _print_resolved(config)
            return 0
        return launch(
            config, log_level=options.log_level, status_fd=options.status_fd, lifeline_fd=options.lifeline_fd,
            timeline=options.timeline, record=options.record, record_limit_bytes=round(options.record_limit * 1e9),
        )  # fmt: skip
    except ConfigError as error:
        raise ConfigError(f"{find_origin(str(error), source, options.set)}: {error}") from None
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ETOOMANYREFS):
            raise
        raise EngineUnavailable(f"{error.strerror}: raise the limit (ulimit -n)") from None


def launch(
    config: Config,
    *,
    log_level: str = "INFO",
    status_fd: int | None = None,
    lifeline_fd: int | None = None,
    timeline: str | os.PathLike[str] | None = None,
    record: str | os.PathLike[str] | None = None,
    record_limit_bytes: int = round(DEFAULT_RECORD_LIMIT_GB * 1e9),
    table: Table = ENGINE,
) -> int:
    """Run an engine until it is told to end, and return the exit status. Call it in the main thread.

    Args:
        config: the checked configuration.
        log_level: of the launcher and the workers, on standard error.
        status_fd: a descriptor for start-up events, one JSON object a line (`engine/announcer.py`).
        lifeline_fd: a descriptor; the engine ends soon after its other end is closed.
        timeline: a file for a trace of all processes and the device.
        record: a file for every step of the GPU process.
        record_limit_bytes: of that file.
        table: declares the processes, rings and sockets.

    Raises ConfigError before any process is started.
    """
    num_workers = config.tokenizer.num_workers + config.grammar.num_workers
    check_room(_NUM_DESCRIPTORS + _NUM_PER_WORKER * num_workers, "this engine")
    check_device(config.model.device)
    model = find_model(config)
    if config.http is not None:
        _check_http(config, config.http, model)
    check_key_files(config.frontend)
    endpoint = config.frontend.endpoint or default_endpoint()
    with signal_pipe() as signal_fd, ExitStack() as stack:
        local_endpoint = stack.enter_context(_local_endpoint(endpoint))
        claim = stack.enter_context(closing(EndpointClaim(local_endpoint, PATIENCE_S)))
        lent = {} if claim.fd is None else {ENDPOINT_CLAIM: claim.fd}
        url = None
        if config.http is not None:
            listener = stack.enter_context(open_listener(config.http))
            lent[HTTP_LISTENER], url = listener.fileno(), url_of(config.http, listener)
        recorder = None if timeline is None else stack.enter_context(Recorder(timeline))
        if record is not None:
            lent[RECORDING] = stack.enter_context(recording_file(record))
        facts = EngineFacts(
            config=config,
            model=model,
            endpoint=endpoint,
            local_endpoint=local_endpoint,
            launcher_pid=os.getpid(),
            log_level=log_level,
            traced=recorder is not None,
            cache_seed=secrets.token_bytes(SEED_BYTES) if config.cache.prefix_caching else None,
            lent=lent,
            record_limit_bytes=record_limit_bytes,
        )
        wiring = Wiring(table, facts)
        resources = stack.enter_context(closing(SharedResources(wiring)))  # the supervisor closes it first
        if recorder is not None:
            recorder.start(resources.traces, _label(config, model))
        supervisor = Supervisor(
            wiring,
            resources,
            Announcer(
                endpoint,
                model.name,
                _describe(config, model),
                status_fd,
                local_endpoint=local_endpoint,
                front=_front(config, model, url),
            ),
            config.supervisor,
            drain_timeout_s=config.frontend.drain_timeout_s,
            signal_fd=signal_fd,
            lifeline_fd=lifeline_fd,
        )
        return supervisor.run()


@contextmanager
def _local_endpoint(endpoint: str) -> Iterator[str]:
    """A Unix socket for this user's programs: `endpoint` if it is one; else one whose folder goes with the engine."""
    if endpoint.startswith("ipc://"):
        yield endpoint
        return
    folder = runtime_folder() / f"ringfeed-clients-{secrets.token_hex(4)}"
    try:
        yield f"ipc://{folder}/client.sock"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_http(config: Config, http: HttpConfig, model: ServedModel) -> None:
    """Raise ConfigError for faults that otherwise an HTTP process would find, which reads the same files."""
    read_keys(http)
    template = read_chat_template(config.tokenizer.chat_template)
    choose_format(model.folder, http.tool_parser, http.reasoning_parser, template=template)


def _front(config: Config, model: ServedModel, url: str | None) -> HttpFront | None:
    if config.http is None or url is None:
        return None
    return HttpFront(url, (config.http.served_model_names or [model.name])[0], needs_key=bool(config.http.api_key_file))


def _describe(config: Config, model: ServedModel) -> str:
    return (
        f"{config.cache.block_size} tokens each, {config.scheduler.max_num_seqs} sequences of up to "
        f"{model.max_model_len} tokens, ring depth {config.ring.depth}"
    )


def _label(config: Config, model: ServedModel) -> str:
    """The name of an engine in its timeline."""
    is_null, depth = config.model.load_format == "null", config.ring.depth
    name = f"no model, steps of {config.model.null_step_ms:g} ms" if is_null else model.name
    return f"{name}, ring.depth {depth}{' (synchronous)' if depth == 1 else ''}"


def _print_resolved(config: Config) -> None:
    """Print the configuration as it would run.

    A missing device or model is a note and not an error: the configuration may be meant for another machine. A model
    that is not here leaves the values open that come from its files.
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
        sys.stdout.reconfigure(encoding="utf-8")  # TOML is always UTF-8
    print(to_toml(config))


def _gigabytes(text: str) -> float:
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = 0.0
    if not 0 < gigabytes < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of gigabytes above 0, for example 0.5")
    return gigabytes


def _descriptor(text: str) -> int:
    """An inherited descriptor. Our child processes do not inherit it."""
    fd = int(text)
    os.set_inheritable(fd, False)
    return fd


if __name__ == "__main__":
    sys.exit(main())
