"""A whole engine for a script or a test: `with Pipeline(config) as p: p.client.generate(...)`."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, Final, NoReturn, Self

import msgspec

from ipc.errors import ConfigError, EngineUnavailable, InvalidRequest
from pipeline.client.endpoint import connectable, runtime_folder
from pipeline.client.inputs import checked_timeout
from pipeline.client.sync_client import Client
from pipeline.engine.config import (
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
from pipeline.engine.launcher_process import EngineProcess
from pipeline.environment.descriptors import hold_standard_descriptors

_LAST_LINES: Final = 20
_NOT_STARTED: Final = "this Pipeline was not started: call start(), or use it in a `with` statement"


class Pipeline:
    """Launches `python -m pipeline.launch` and takes it down again.

    Args:
        config: a TOML file, a Config, or nested plain values.
        overrides: "section.key=value", several of them, or {"section.key": value}.
        log: a file to write the engine's log to; None = only `log_text()` has it.
        startup_timeout_s: how long the engine may take to be ready; None = for ever.
        timeline: a file for a trace of all that the engine does (`python -m pipeline.launch --timeline`).

    Without `frontend.endpoint` the engine gets a private one of its own. Raises ConfigError for a configuration that
    cannot work, EngineUnavailable, with the last lines of its log, for an engine that does not come up. Leaves nothing:
    the engine also ends if this process is killed, or when the last reference to the Pipeline and its client is
    dropped. A forked child can use the client; leaving the `with` block there does not end the engine.
    """

    def __init__(
        self,
        config: str | os.PathLike[str] | Config | Mapping[str, Any],
        overrides: Iterable[str] | Mapping[str, Any] = (),
        *,
        log: str | os.PathLike[str] | None = None,
        startup_timeout_s: float | None = 120.0,
        timeline: str | os.PathLike[str] | None = None,
    ) -> None:
        if not isinstance(overrides, Iterable):
            raise ConfigError(f'overrides ({overrides!r}) must be "section.key=value", a list of them, or a mapping')
        if isinstance(overrides, Mapping):
            overrides = overrides_from_dict(overrides)
        self._overrides = [overrides] if isinstance(overrides, str) else list(overrides)
        for override in self._overrides:
            if not isinstance(override, str):
                raise ConfigError(f'override ({override!r}) must be "section.key=value"')
        if timeline is not None and not isinstance(timeline, str | os.PathLike):
            raise ConfigError(f"timeline ({timeline!r}) must be the path of a file")
        if isinstance(config, Config):
            config = {
                section: {key: value for key, value in values.items() if value is not None}
                for section, values in msgspec.to_builtins(config).items()
            }
        if isinstance(config, Mapping):
            self._source = "config"
            self.config = config_from_dict(config, self._source, overrides=self._overrides)
        elif not isinstance(config, str | os.PathLike):
            raise ConfigError(f"config ({config!r}) must be the path of a TOML file, a Config, or a mapping")
        else:
            self._source = os.fspath(config)
            self.config = load_config(config, self._overrides)
        self._log_path = log
        self._startup_timeout_s = checked_timeout(startup_timeout_s, "startup_timeout_s")
        self._timeline = timeline
        self._log: IO[bytes] | None = None
        self._process: EngineProcess | None = None
        self._client: Client | None = None
        self.endpoint = connectable(self.config.frontend.endpoint or "")
        self.pids: dict[str, int] = {}  # role -> process id, "launcher" included

    @property
    def client(self) -> Client:
        """A client of this engine, closed with it. The engine does not end before the client is dropped."""
        if self._client is None:
            engine = self._started()
            self._client = Client(self.endpoint)
            self._client.keep_alive(engine)
        return self._client

    def start(self) -> Self:
        """Launch the engine and wait until it is ready."""
        if self._process is not None:
            raise InvalidRequest("this Pipeline was started already: make another one for another engine")
        config, folder = self.config, None
        if not self.endpoint:
            # The launcher makes and removes it; we remove it only if the launcher was killed.
            folder = runtime_folder() / f"ringfeed-{uuid.uuid4().hex}"
            self.endpoint = f"ipc://{folder}/client.sock"
            config = msgspec.structs.replace(
                config, frontend=msgspec.structs.replace(config.frontend, endpoint=self.endpoint)
            )
        timeline = () if self._timeline is None else ("--timeline", os.fspath(self._timeline))
        hold_standard_descriptors()
        self._log = _open_log(self._log_path)
        self._process = EngineProcess(to_toml(config), timeline, log=self._log, folder=folder)
        self.pids["launcher"] = self._process.process.pid
        try:
            self._wait_ready(self._process)
        except BaseException as error:
            if self.kill() == BAD_CONFIG_STATUS and isinstance(error, EngineUnavailable):
                raise self._config_error() from None
            raise
        return self

    def wait(self, timeout_s: float | None) -> int:
        """Wait for the engine to end by itself and return its exit status. Raises TimeoutError if it does not."""
        return self._owned().wait(checked_timeout(timeout_s))

    def stop(self) -> int:
        """End the engine in order, finishing what is open, and return its exit status. A second call does nothing."""
        return self._finish(self.config.frontend.drain_timeout_s)

    def kill(self) -> int:
        """End the engine in haste: open requests get an error. Returns its exit status."""
        return self._finish(None)

    def log_text(self) -> str:
        """What the engine has logged so far."""
        if self._log is None:
            raise InvalidRequest(_NOT_STARTED)
        return os.pread(self._log.fileno(), os.fstat(self._log.fileno()).st_size, 0).decode(errors="replace")

    def __reduce__(self) -> NoReturn:
        raise InvalidRequest(
            "a Pipeline belongs to the process that made it and cannot be copied or pickled: give other processes its "
            "client, or its endpoint"
        )

    def __enter__(self) -> Self:
        return self if self._process is not None else self.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._client is not None:
            self._client.close()  # cancels what is open, so that draining has nothing to wait for
        if self._started().owner_pid == os.getpid():  # a forked child that leaves the block leaves the engine alone
            self.stop() if kind is None else self.kill()

    def _started(self) -> EngineProcess:
        if self._process is None:
            raise InvalidRequest(_NOT_STARTED)
        return self._process

    def _owned(self) -> EngineProcess:
        engine = self._started()
        if engine.owner_pid != os.getpid():
            raise InvalidRequest(
                f"this Pipeline was started by process {engine.owner_pid}, before a fork: only that process can end it"
            )
        return engine

    def _wait_ready(self, engine: EngineProcess) -> None:
        try:
            for event in engine.events(self._startup_timeout_s):
                self.pids |= event.get("pids", {})
                if event["event"] == "ready":
                    return
        except TimeoutError:
            raise self._startup_error(f"is not ready after startup_timeout_s ({self._startup_timeout_s} s)") from None
        raise self._startup_error("did not come up")

    def _startup_error(self, what: str) -> EngineUnavailable:
        lines = self.log_text().splitlines()[-_LAST_LINES:]
        return EngineUnavailable(f"the engine {what}; its log ends:\n" + "\n".join(lines))

    def _config_error(self) -> ConfigError:
        """The launcher's, which got the configuration by its standard input, put down to where we have it from."""
        message = self.log_text().rpartition(f"error: {name_source(STANDARD_INPUT)}: ")[2].strip()
        return ConfigError(f"{find_origin(message, self._source, self._overrides)}: {message}")

    def _finish(self, drain_s: float | None) -> int:
        engine = self._owned()
        if self._client is not None:
            self._client.close()
        return engine.end(drain_s)


def _open_log(path: str | os.PathLike[str] | None) -> IO[bytes]:
    """A file to write and read back: the caller's, or one without a name."""
    try:
        return tempfile.TemporaryFile() if path is None else Path(path).open("w+b")
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(f"log ({path!r}) cannot be written: {error}") from None
