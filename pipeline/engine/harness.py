"""Launches a whole engine for a script or a test, and ends it: `with Pipeline(config) as pipeline: ...`.

Owns the user's view of one engine: its configuration, its client and its log. `launcher_process.py` owns the process.
"""

from __future__ import annotations

import os
import reprlib
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
    override_strings,
    to_toml,
)
from pipeline.engine.launcher_process import EngineProcess
from pipeline.environment.descriptors import hold_standard_descriptors

_LAST_LINES: Final = 20
_NOT_STARTED: Final = "this Pipeline was not started: call start(), or use it in a `with` statement"


class Pipeline:
    """An engine for a script or a test: launches `ringfeed serve` as a child process and ends it again.

        with Pipeline(model="Qwen/Qwen3-0.6B") as pipeline:
            print(pipeline.client.generate("Hello").text)

    Args:
        config: a TOML file's path, a Config, or nested plain values such as {"model": {"path": "..."}}.
        overrides: "section.key=value", several of them, or {"section.key": value}; they win over `config`.
        model: instead of `config`: a model's folder or Hugging Face hub id. Every other key has its default.
        log: a file for the engine's log; None (default) = only `log_text()` has it.
        startup_timeout_s: seconds that the engine may take to be ready (default 120); None = no limit.
        timeline: a file for a trace of all processes and the device (`ringfeed serve --timeline`).
        record: a file for every step of the GPU process, prompts included (`ringfeed serve --record`).

    A relative model path starts at the current folder; in a TOML file it starts at the file's folder. Without
    `frontend.endpoint` the engine gets a private endpoint. Without `http.port` its HTTP server takes a free port;
    `http_url` has the server's URL once the engine is ready, and is None without a server.

    Raises ConfigError for a configuration that cannot work, and EngineUnavailable, with the last lines of the engine's
    log, if the engine does not start. The engine also ends if this process is killed, or when the last reference to the
    Pipeline and its client is dropped; it leaves no process, socket or memory. A forked child can use the client.
    Leaving the `with` block in the child does not end the engine.
    """

    def __init__(
        self,
        config: str | os.PathLike[str] | Config | Mapping[str, Any] | None = None,
        overrides: Iterable[str] | Mapping[str, Any] = (),
        *,
        model: str | os.PathLike[str] | None = None,
        log: str | os.PathLike[str] | None = None,
        startup_timeout_s: float | None = 120.0,
        timeline: str | os.PathLike[str] | None = None,
        record: str | os.PathLike[str] | None = None,
    ) -> None:
        self._overrides = override_strings(overrides)
        self._files: list[str] = []  # options of `ringfeed serve`
        for name, path in (("timeline", timeline), ("record", record)):
            if path is not None:
                if not isinstance(path, str | os.PathLike):
                    raise ConfigError(f"{name} ({path!r}) must be the path of a file")
                self._files += [f"--{name}", os.fspath(path)]
        self._source, self.config = _resolve(config, model, self._overrides)
        self._log_path = log
        self._startup_timeout_s = checked_timeout(startup_timeout_s, "startup_timeout_s")
        self._log: IO[bytes] | None = None
        self._process: EngineProcess | None = None
        self._client: Client | None = None
        self.endpoint = connectable(self.config.frontend.endpoint or "")
        self._local_endpoint = ""  # where this user's clients need no keys, once the engine is ready
        self.http_url: str | None = None
        self._pids: dict[str, int] = {}

    @property
    def pids(self) -> dict[str, int]:
        """The process id of each role, "launcher" included. A process that is started again has a new one."""
        if self._process is not None:
            for event in self._process.pending_events():
                self._pids |= event.get("pids", {})
        return dict(self._pids)

    @property
    def client(self) -> Client:
        """A Client of this engine. `stop()`, `kill()` and leaving the `with` block close it.

        It keeps the engine alive: dropping only the Pipeline does not end the engine.
        """
        if self._client is None:
            engine = self._started()
            self._client = Client(self._local_endpoint or self.endpoint)
            self._client.keep_alive(engine)
        return self._client

    def start(self) -> Self:
        """Launch the engine and wait until it is ready. The `with` statement does this too.

        Raises ConfigError, or EngineUnavailable if the engine is not ready in time; InvalidRequest at a second call.
        """
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
        if config.http is not None and config.http.port is None:
            config = msgspec.structs.replace(config, http=msgspec.structs.replace(config.http, port=0))
        hold_standard_descriptors()
        self._log = _open_log(self._log_path)
        self._process = EngineProcess(to_toml(config), self._files, log=self._log, folder=folder)
        self._pids["launcher"] = self._process.process.pid
        try:
            self._wait_ready(self._process)
        except BaseException as error:
            if self.kill() == BAD_CONFIG_STATUS and isinstance(error, EngineUnavailable):
                raise self._config_error() from None
            raise
        return self

    def wait(self, timeout_s: float | None) -> int:
        """Wait until the engine ends by itself, and return its exit status.

        Raises TimeoutError after `timeout_s` seconds (None = no limit).
        """
        return self._owned().wait(checked_timeout(timeout_s))

    def stop(self) -> int:
        """Finish open requests of other clients, end the engine, and return its exit status.

        Draining takes at most `frontend.drain_timeout_s` seconds. The own `client` is closed at once. A second call
        does nothing.
        """
        return self._finish(self.config.frontend.drain_timeout_s)

    def kill(self) -> int:
        """End the engine at once, and return its exit status. Open requests get an error."""
        return self._finish(None)

    def log_text(self) -> str:
        """The engine's log so far."""
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
                self._pids |= event.get("pids", {})
                if event["event"] == "ready":
                    self.http_url, self._local_endpoint = event["http_url"], event["local_endpoint"]
                    return
        except TimeoutError:
            raise self._startup_error(f"is not ready after startup_timeout_s ({self._startup_timeout_s} s)") from None
        raise self._startup_error("did not come up")

    def _startup_error(self, what: str) -> EngineUnavailable:
        lines = self.log_text().splitlines()[-_LAST_LINES:]
        return EngineUnavailable(f"the engine {what}; its log ends:\n" + "\n".join(lines))

    def _config_error(self) -> ConfigError:
        """The launcher's error. It names standard input as the source; this one names the user's source."""
        message = self.log_text().rpartition(f"error: {name_source(STANDARD_INPUT)}: ")[2].strip()
        return ConfigError(f"{find_origin(message, self._source, self._overrides)}: {message}")

    def _finish(self, drain_s: float | None) -> int:
        engine = self._owned()
        if self._client is not None:
            self._client.close()
        return engine.end(drain_s)


def _resolve(
    config: str | os.PathLike[str] | Config | Mapping[str, Any] | None,
    model: str | os.PathLike[str] | None,
    overrides: list[str],
) -> tuple[str, Config]:
    """The name of the configuration's source in errors, and the checked configuration. Raises ConfigError."""
    if model is not None:
        if config is not None:
            raise ConfigError(
                f"config ({reprlib.repr(config)}) and model ({reprlib.repr(model)}) are both given: give one; to run "
                'another model with a configuration, give overrides={"model.path": ...}'
            )
        if not isinstance(model, str | os.PathLike):
            raise ConfigError(f"model ({model!r}) must be a folder or a hub id")
        source = f"model={os.fspath(model)!r}"
        given = {"model": {"path": os.fspath(model)}, "http": {}}
        return source, config_from_dict(given, source, overrides=overrides)
    if config is None:
        raise ConfigError(
            'config (None) and model (None) are both missing: give a TOML file, Pipeline("engine.toml"), or a model, '
            'Pipeline(model="FOLDER_OR_HUB_ID")'
        )
    if isinstance(config, Config):
        config = {
            section: {key: value for key, value in values.items() if value is not None}
            for section, values in msgspec.to_builtins(config).items()
            if values is not None
        }
    if isinstance(config, Mapping):
        return "config", config_from_dict(config, "config", overrides=overrides)
    if not isinstance(config, str | os.PathLike):
        raise ConfigError(f"config ({config!r}) must be the path of a TOML file, a Config, or a mapping")
    return os.fspath(config), load_config(config, overrides)


def _open_log(path: str | os.PathLike[str] | None) -> IO[bytes]:
    """A file to write and read back: the caller's file, or a temporary one without a name."""
    try:
        return tempfile.TemporaryFile() if path is None else Path(path).open("w+b")
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(f"log ({path!r}) cannot be written: {error}") from None
