from __future__ import annotations

import re
from pathlib import Path

import pytest
import zmq.auth

from ipc.errors import ConfigError
from ipc.key_files import (
    KeyPair,
    make_key_pair,
    read_public_file,
    read_secret_file,
    write_public_file,
    write_secret_file,
)


def test_zeromqs_own_tools_read_the_files(tmp_path: Path) -> None:
    keys = make_key_pair(server=make_key_pair().public)
    write_secret_file(tmp_path / "a.key_secret", keys)
    write_public_file(tmp_path / "a.key", keys.public)
    assert zmq.auth.load_certificate(tmp_path / "a.key_secret") == (keys.public, keys.secret)
    assert zmq.auth.load_certificate(tmp_path / "a.key") == (keys.public, None)
    assert read_secret_file(tmp_path / "a.key_secret") == keys
    assert read_public_file(tmp_path / "a.key") == keys.public


def test_the_files_of_zeromqs_own_tools_are_read(tmp_path: Path) -> None:
    public_path, secret_path = zmq.auth.create_certificates(tmp_path, "a")
    Path(secret_path).chmod(0o600)
    keys = read_secret_file(secret_path)
    assert keys == KeyPair(*zmq.auth.load_certificate(secret_path))
    assert read_public_file(public_path) == keys.public


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620])
def test_a_secret_file_that_others_can_open_is_refused_with_the_cure(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "a.key_secret"
    write_secret_file(path, make_key_pair())
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(mode)
    with pytest.raises(
        ConfigError, match=rf"its mode {mode:04o} lets others read it: run chmod 600 {re.escape(str(path))}"
    ):
        read_secret_file(path)


def test_a_secret_file_is_never_replaced(tmp_path: Path) -> None:
    write_secret_file(tmp_path / "a", make_key_pair())
    with pytest.raises(FileExistsError):
        write_secret_file(tmp_path / "a", make_key_pair())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "has no public-key and no secret-key: give a file that `ringfeed keys` has made"),
        (b"\xff\xfe", "is not a key file"),
        (b'public-key = "' + b'"' * 40 + b'"', "has no public-key and no secret-key"),
        (b'public-key = "' + b"#" * 40 + b'"', "has no public-key and no secret-key"),
        (b'public-key = "abc"', "has no public-key and no secret-key"),
    ],
)
def test_a_file_without_keys_is_refused(tmp_path: Path, text: bytes, expected: str) -> None:
    path = tmp_path / "a.key_secret"
    path.write_bytes(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError) as raised:
        read_secret_file(path)
    assert str(raised.value).startswith(str(path))
    assert expected in str(raised.value)


def test_keys_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    write_secret_file(tmp_path / "a", KeyPair(make_key_pair().public, make_key_pair().secret))
    with pytest.raises(ConfigError, match="its public-key does not belong to its secret-key"):
        read_secret_file(tmp_path / "a")
