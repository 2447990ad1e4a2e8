"""A whole engine for a script or a test: `with Pipeline(config) as p: p.client.generate(...)`."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, Final, Self

import msgspec

from ipc.errors import ConfigError, EngineUnavailable
from pipeline.config import (
    BAD_CONFIG_STATUS,
    STANDARD_INPUT,
    Config,
    config_from_dict,
    find_origin,
    load_config,
    name_source,
    overrides_from_dict,
    to_toml,
)
from pipeline.endpoint import connectable, runtime_folder
from pipeline.python_module import module_command, module_environment
from pipeline.sync_client import Client

_STOP_MARGIN_S: Final = 15.0  # beyond the drain's own time-out
_LAST_LINES: Final = 20


class Pipeline:
    """Launches `python -m pipeline.launch` and takes it down again.

    Args:
        config: a TOML file, a Config, or nested plain values.
        overrides: "section.key=value", several of them, or {"section.key": value}.
        log: a file to write the engine's log to; None = only `log_text()` has it.
        startup_timeout_s: how long the engine may take to be ready.
        timeline: a file for a trace of all that the engine does (`python -m pipeline.launch --timeline`).

    Without `frontend.endpoint` the engine gets a private one of its own. Raises ConfigError for a configuration that
    cannot work, EngineUnavailable, with the last lines of its log, for an engine that does not come up. Leaves nothing:
    the engine ends also if this process is killed.
    """

    def __init__(
        self,
        config: str | os.PathLike[str] | Config | Mapping[str, Any],
        overrides: Iterable[str] | Mapping[str, Any] = (),
        *,
        log: str | os.PathLike[str] | None = None,
        startup_timeout_s: float = 120.0,
        timeline: str | os.PathLike[str] | None = None,
    ) -> None:
        if isinstance(overrides, Mapping):
            overrides = overrides_from_dict(overrides)
        self._overrides = [overrides] if isinstance(overrides, str) else list(overrides)
        if isinstance(config, Config):
            config = {
                section: {key: value for key, value in values.items() if value is not None}
                for section, values in msgspec.to_builtins(config).items()
            }
        if isinstance(config, Mapping):
            self._source = "config"
            self.config = config_from_dict(config, self._source, overrides=self._overrides)
        else:
            self._source = os.fspath(config)
            self.config = load_config(config, self._overrides)
        self._log_path = log
        self._startup_timeout_s = startup_timeout_s
        self._timeline = timeline
        self._process: subprocess.Popen[bytes] | None = None
        self._client: Client | None = None
        self._private_folder: Path | None = None
        self._lifeline: int | None = None
        self.endpoint = connectable(self.config.frontend.endpoint or "")
        self.pids: dict[str, int] = {}  # role -> process id, "launcher" included

    @property
    def client(self) -> Client:
        """A client of this engine, closed with it."""
        if self._client is None:
            self._client = Client(self.endpoint)
        return self._client

    def start(self) -> Self:
        """Launch the engine and wait until it is ready."""
        assert self._process is None, "a Pipeline is started once"
        config = self.config
        if not self.endpoint:
            # The launcher makes and removes it; we do only if it was killed.
            self._private_folder = runtime_folder() / f"ringfeed-{uuid.uuid4().hex}"
            self.endpoint = f"ipc://{self._private_folder}/client.sock"
            config = msgspec.structs.replace(
                config, frontend=msgspec.structs.replace(config.frontend, endpoint=self.endpoint)
            )
        timeline = () if self._timeline is None else ("--timeline", os.fspath(self._timeline))
        self._log = _open_log(self._log_path)
        status_reader, status_writer = os.pipe()
        lifeline_reader, self._lifeline = os.pipe()
        try:
            self._process = subprocess.Popen(
                module_command(
                    "pipeline.launch", "--config", STANDARD_INPUT,
                    "--status-fd", str(status_writer), "--lifeline-fd", str(lifeline_reader), *timeline,
                ),
                stdin=subprocess.PIPE, stdout=self._log, stderr=self._log,
                pass_fds=(status_writer, lifeline_reader), env=module_environment(), process_group=0,
            )  # fmt: skip
            assert self._process.stdin is not None, "asked for a pipe"
            with self._process.stdin as stdin, contextlib.suppress(BrokenPipeError):
                stdin.write(to_toml(config).encode())
        finally:
            os.close(status_writer)
            os.close(lifeline_reader)
        self.pids["launcher"] = self._process.pid
        try:
            with os.fdopen(status_reader, "rb", buffering=0) as status:
                self._wait_ready(status.fileno())
        except BaseException as error:
            if self.kill() == BAD_CONFIG_STATUS and isinstance(error, EngineUnavailable):
                raise self._config_error() from None
            raise
        return self

    def wait(self, timeout_s: float) -> int:
        """Wait for the engine to end by itself and return its exit status. Raises TimeoutError if it does not."""
        assert self._process is not None, "the Pipeline was not started"
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"the engine still runs after {timeout_s:g} s") from None

    def stop(self) -> int:
        """End the engine in order, finishing what is open, and return its exit status. A second call does nothing."""
        assert self._process is not None, "the Pipeline was not started"
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        return self._finish(self.config.frontend.drain_timeout_s + _STOP_MARGIN_S)

    def kill(self) -> int:
        """End the engine in haste: open requests get an error. Returns its exit status."""
        assert self._process is not None, "the Pipeline was not started"
        return self._finish(_STOP_MARGIN_S)

    def log_text(self) -> str:
        """What the engine has logged so far."""
        self._log.flush()
        return os.pread(self._log.fileno(), os.fstat(self._log.fileno()).st_size, 0).decode(errors="replace")

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._client is not None:
            self._client.close()  # cancels what is open, so that draining has nothing to wait for
        self.stop() if kind is None else self.kill()

    def _wait_ready(self, status_fd: int) -> None:
        deadline = time.monotonic() + self._startup_timeout_s
        pending = b""
        while True:
            readable, _, _ = select.select([status_fd], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                raise self._startup_error(f"is not ready after {self._startup_timeout_s:g} s")
            chunk = os.read(status_fd, 65_536)
            if not chunk:
                raise self._startup_error("did not come up")
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                event = json.loads(line)
                self.pids |= event.get("pids", {})
                if event["event"] == "ready":
                    return

    def _startup_error(self, what: str) -> EngineUnavailable:
        lines = self.log_text().splitlines()[-_LAST_LINES:]
        return EngineUnavailable(f"the engine {what}; its log ends:\n" + "\n".join(lines))

    def _config_error(self) -> ConfigError:
        """The launcher's, which got the configuration by its standard input, put down to where we have it from."""
        message = self.log_text().rpartition(f"error: {name_source(STANDARD_INPUT)}: ")[2].strip()
        return ConfigError(f"{find_origin(message, self._source, self._overrides)}: {message}")

    def _finish(self, timeout_s: float) -> int:
        assert self._process is not None, "the Pipeline was not started"
        if self._client is not None:
            self._client.close()
        if timeout_s <= _STOP_MARGIN_S:
            self._close_lifeline()
        try:
            status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        self._close_lifeline()
        if self._private_folder is not None:
            shutil.rmtree(self._private_folder, ignore_errors=True)
        return status

    def _close_lifeline(self) -> None:
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None


def _open_log(path: str | os.PathLike[str] | None) -> IO[bytes]:
    """A file to write and read back: the caller's, or one without a name."""
    return tempfile.TemporaryFile() if path is None else Path(path).open("w+b")
