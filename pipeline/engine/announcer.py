"""Reports the start of an engine: log lines, a progress bar on a terminal, and JSON events on a pipe."""

from __future__ import annotations

import json
import logging
import os
import select
import shlex
import sys
from dataclasses import dataclass
from typing import Any, Final

from ipc.messages import Progress
from pipeline.terminal.progress_bar import forgiving

logger = logging.getLogger(__name__)

_LOG_EVERY: Final = 0.25  # share of a stage between two log lines, without a terminal


@dataclass(frozen=True)
class HttpFront:
    """Where the HTTP server listens, and the name under which it serves the model."""

    url: str
    model: str
    needs_key: bool

    def curl(self) -> str:
        """A command that asks for a chat completion, for a POSIX shell."""
        body = {"model": self.model, "messages": [{"role": "user", "content": "Hello"}]}
        words = ["curl", f"{self.url}/v1/chat/completions", "-H", "Content-Type: application/json"]
        if self.needs_key:
            words += ["-H", "Authorization: Bearer KEY"]
        if self.url.startswith("https"):
            words.insert(1, "--insecure")
        return shlex.join([*words, "-d", json.dumps(body, ensure_ascii=False)])


class Announcer:
    """Reports the stages of one engine's start.

    `status_fd`, if given, gets one JSON object a line: {"event": "spawned", "endpoint": ..., "pids": {role: pid}} and
    {"event": "ready", "endpoint": ..., "local_endpoint": ..., "http_url": ..., "info": {...}}. `close()` closes it.
    `local_endpoint`: where clients of this user need no keys (default: `endpoint`). `front`: of the HTTP server, if
    there is one.
    """

    def __init__(
        self,
        endpoint: str,
        model_name: str,
        details: str,
        status_fd: int | None = None,
        *,
        local_endpoint: str | None = None,
        front: HttpFront | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._local_endpoint = local_endpoint or endpoint
        self._front = front
        self._model_name = model_name
        self._details = details
        self._status_fd = status_fd
        self._untold: dict[str, int] = {}  # processes that no event has named yet
        self._said: dict[str, tuple[str, float]] = {}
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}
        self.is_ready = False

    def spawned(self, pids: dict[str, int]) -> None:
        """The launcher has started these workers, for the first time or again."""
        logger.info("started %s", ", ".join(f"{role} ({pid})" for role, pid in pids.items()))
        self._untold |= pids
        if self._is_read():
            self._tell_program(event="spawned", endpoint=self._endpoint, pids=self._untold)
            self._untold = {}

    def progress(self, message: Progress) -> None:
        """A worker reports a stage of its start and the share that is done."""
        if sys.stderr.isatty():
            self._show(message)
            return
        stage, fraction = self._said.get(message.role, ("", 0.0))
        if message.stage != stage or message.fraction >= min(1.0, fraction + _LOG_EVERY):
            self._said[message.role] = (message.stage, message.fraction)
            logger.info("%s: %s (%s)", message.role, message.stage, _how_far(message))

    def worker_ready(self, role: str) -> None:
        """A worker has started."""
        logger.debug("%s is ready", role)

    def ready(self, info: dict[str, int]) -> None:
        """The engine accepts requests."""
        self._close_bar()
        self.is_ready = True
        logger.info(
            "ready: %s (model %s, %d KV blocks, %s)",
            self._endpoint,
            self._model_name,
            info["num_blocks"],
            self._details,
        )
        url = None
        if self._front is not None:
            url = self._front.url
            logger.info("serving %s (a page for browsers, and the APIs of OpenAI and Anthropic); try:", url)
            logger.info("  %s", self._front.curl())
        self._tell_program(
            event="ready", endpoint=self._endpoint, local_endpoint=self._local_endpoint, http_url=url, info=info
        )

    def close(self) -> None:
        """Remove the progress bar and close the pipe."""
        self._close_bar()
        if self._status_fd is not None:
            os.close(self._status_fd)
            self._status_fd = None

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self, message: Progress) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as ProgressBar

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[far]}"))
            console = Console(file=forgiving(sys.stderr))
            self._bar = ProgressBar(*columns, TimeElapsedColumn(), console=console, transient=True)
            self._bar.start()
        if message.role not in self._tasks:
            self._tasks[message.role] = self._bar.add_task(message.stage, total=1.0, far="")
        self._bar.update(
            self._tasks[message.role],
            description=f"{message.role}: {message.stage}",
            completed=message.fraction,
            far=_how_far(message),
        )

    def _is_read(self) -> bool:
        """Whether the pipe has room. A program that never reads it must not stop the launcher."""
        poller = select.poll()
        if self._status_fd is not None:
            poller.register(self._status_fd, select.POLLOUT)
        return bool(poller.poll(0))

    def _tell_program(self, **event: Any) -> None:
        if self._status_fd is not None:
            try:
                os.write(self._status_fd, (json.dumps(event) + "\n").encode())
            except BrokenPipeError:  # the reader has closed the pipe
                self.close()


def _how_far(message: Progress) -> str:
    """ "40 %", or "40 %, 6.4 of 16.1 GB" for a stage that counts bytes."""
    percent = f"{100 * message.fraction:.0f} %"
    if not message.total_bytes:
        return percent
    unit, name = (1e9, "GB") if message.total_bytes >= 1e9 else (1e6, "MB")
    return f"{percent}, {message.fraction * message.total_bytes / unit:.1f} of {message.total_bytes / unit:.1f} {name}"
