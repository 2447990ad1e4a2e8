from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from ipc.errors import ConfigError
from ipc.key_files import make_key_pair, write_secret_file
from pipeline import AsyncClient, Client

TCP = "tcp://127.0.0.1:5757"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "a.key_secret"
    write_secret_file(path, make_key_pair(make_key_pair().public))
    return path


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_pickled_client_takes_the_files_path_with_it_and_no_key(
    kind: type[Client] | type[AsyncClient], key_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps(kind(TCP, key_file=key_file.name))
    monkeypatch.chdir("/")
    assert pickle.loads(data).key_file == str(key_file)
    assert key_file.read_text().splitlines()[-1].split('"')[1].encode() not in data


def test_the_environment_names_the_file_for_tcp_endpoints_only(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGFEED_KEY_FILE", str(key_file))
    assert Client(TCP).key_file == str(key_file)
    assert Client("ipc:///tmp/x").key_file is None
    monkeypatch.setenv("RINGFEED_KEY_FILE", "/nowhere")
    with pytest.raises(ConfigError, match=r"^RINGFEED_KEY_FILE: /nowhere cannot be read: No such file"):
        Client(TCP)
    assert Client(TCP, key_file=key_file).key_file == str(key_file)


def test_a_key_file_that_protects_nothing_is_refused(key_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no use at ipc:///tmp/x: only tcp:// endpoints have keys"):
        Client("ipc:///tmp/x", key_file=key_file)
    with pytest.raises(ConfigError, match=r"key_file \(3\) must be the path of a file"):
        Client(TCP, key_file=3)  # type: ignore[arg-type]
    write_secret_file(tmp_path / "server.key_secret", make_key_pair())
    with pytest.raises(ConfigError, match=r"^key_file: .*server.key_secret has no server-key: add the line"):
        Client(TCP, key_file=tmp_path / "server.key_secret")
    key_file.chmod(0o644)
    with pytest.raises(ConfigError, match=r"^key_file: .* lets others read it: run chmod 600"):
        Client(TCP, key_file=key_file)
