"""The claim on a file: each kind of failure is told as what it is."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from contextlib import closing
from io import FileIO
from pathlib import Path

import pytest

from ipc.errors import ConfigError, InvalidRequest
from pipeline.batch_file.output_file import OutputFile
from pipeline.environment.claimed_file import open_claimed

OPENERS: list[Callable[[Path], FileIO | OutputFile]] = [lambda path: open_claimed(path, "--timeline"), OutputFile]


def failing(code: int) -> Callable[..., int]:
    def fail(*_: object, **__: object) -> int:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOSPC, errno.EROFS])
def test_a_file_that_cannot_be_opened_is_refused_with_the_systems_reason(
    opener: Callable[[Path], object], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "open", failing(code))
    with pytest.raises((ConfigError, InvalidRequest), match=f"cannot be written: {os.strerror(code)}$"):
        opener(tmp_path / "f")


@pytest.mark.parametrize("opener", OPENERS)
def test_only_a_claimed_file_is_said_to_have_another_writer(
    opener: Callable[[Path], FileIO | OutputFile], tmp_path: Path
) -> None:
    with (
        closing(opener(tmp_path / "f")),
        pytest.raises((ConfigError, InvalidRequest), match=r"another (engine|batch) writes"),
    ):
        opener(tmp_path / "f")
    opener(tmp_path / "f").close()  # the claim has ended


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EACCES])
def test_a_file_system_without_locks_is_used_with_a_warning(
    opener: Callable[[Path], FileIO | OutputFile],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(code))
    opener(tmp_path / "f").close()
    assert f"cannot be locked ({os.strerror(code)})" in caplog.text
    assert (tmp_path / "f").exists()


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSPC])
def test_a_file_that_cannot_be_emptied_is_refused_and_its_claim_ends(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An append-only file can be opened, and not emptied."""

    class FullFile(FileIO):
        def truncate(self, size: int | None = None) -> int:
            return failing(code)()

    with monkeypatch.context() as patched:
        patched.setattr("pipeline.environment.claimed_file.FileIO", FullFile)
        with pytest.raises(ConfigError, match=f"^--timeline .*f: cannot be written: {os.strerror(code)}$"):
            open_claimed(tmp_path / "f", "--timeline")
    open_claimed(tmp_path / "f", "--timeline").close()
