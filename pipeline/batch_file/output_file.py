"""The output file of a batch: one batch at a time writes it, and a later one goes on with it."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from ipc.errors import InvalidRequest
from pipeline.batch_file.lines import AnswerLine, read_answers
from pipeline.environment.claimed_file import claim


class OutputFile:
    """The output file, open and locked until `close`. Creates it if it does not exist.

    Each line is written at once and whole, so a killed process leaves at most one torn line. Raises InvalidRequest if
    the file cannot be written, is not a regular one, or another batch writes it.
    """

    def __init__(self, path: Path) -> None:
        if str(path) == "-":
            raise InvalidRequest('OUT.jsonl ("-") must be a file, because a stopped batch goes on with it: name one')
        self.num_lines = 0  # written by this batch
        self._path = path
        self._fd = self._open()

    def _open(self) -> int:
        while True:
            try:
                fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
            except OSError as error:
                raise InvalidRequest(f"OUT.jsonl ({str(self._path)!r}) cannot be written: {error.strerror}") from None
            try:
                self._lock(fd)
                if self._is_at_path(fd):
                    return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # a batch that has ended since then replaced the file

    def _lock(self, fd: int) -> None:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InvalidRequest(
                f"OUT.jsonl ({str(self._path)!r}) must be a regular file, because a stopped batch goes on with it"
            )
        if not claim(fd, name := f"OUT.jsonl ({str(self._path)!r})"):
            raise InvalidRequest(
                f"{name}: another batch writes this file: wait for its end, or give another output file"
            )

    def _is_at_path(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self._path))
        except FileNotFoundError:
            return False

    def repair(self, *, retry_failed: bool) -> tuple[set[str], int]:
        """Make the output of an earlier run ready to be continued. Returns the ids that are done, and how many failed.

        Removes a last line that was not written to its end, and with `retry_failed` the lines of failed requests.
        Raises InvalidRequest for a file that is not the output of a batch, and leaves it as it is.
        """
        done: set[str] = set()
        num_failed, keeps_all = 0, True
        with self._temporary_file() as kept, open(os.dup(self._fd), "rb") as source:
            try:
                source.seek(0)
                for line, answer in read_answers(source, str(self._path)):
                    is_failed = answer is not None and answer.response.status_code != 200
                    if answer is None or (is_failed and retry_failed):
                        keeps_all = False
                        continue
                    done.add(answer.custom_id)
                    num_failed += is_failed
                    kept.write(line)
                kept.flush()
                if not keeps_all:
                    self._replace_by(kept)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(kept.name)
        return done, num_failed

    def _temporary_file(self) -> Any:
        """A new file in the folder of this one, which can take its place."""
        try:
            return tempfile.NamedTemporaryFile(dir=self._path.parent, prefix=f".{self._path.name}.", delete=False)
        except OSError as error:
            raise InvalidRequest(
                f"OUT.jsonl ({str(self._path)!r}) cannot be repaired, because its folder takes no new file: "
                f"{error.strerror}"
            ) from None

    def _replace_by(self, kept: Any) -> None:
        """Put a file in the place of this one, locked before any other batch can see it."""
        shutil.copymode(self._path, kept.name)
        os.fsync(kept.fileno())
        self._lock(kept.fileno())
        os.replace(kept.name, self._path)
        os.close(self._fd)
        self._fd = os.dup(kept.fileno())  # a copy shares the lock and the position

    def write(self, line: AnswerLine) -> None:
        """Raises OSError if the disk is full."""
        data = memoryview(msgspec.json.encode(line) + b"\n")
        while data:
            data = data[os.write(self._fd, data) :]
        self.num_lines += 1

    def close(self) -> None:
        """Close and unlock the file."""
        os.close(self._fd)
