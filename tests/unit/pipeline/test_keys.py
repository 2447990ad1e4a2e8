from __future__ import annotations

from pathlib import Path

import pytest

from ipc.key_files import read_public_file, read_secret_file
from pipeline import cli
from pipeline.engine.config import config_from_toml
from workers.gateway.client_keys import check_key_files


def test_the_printed_lines_and_files_make_an_engine_and_its_clients(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new" / "keys"
    assert cli.main(["keys", "laptop", "ci", "--folder", str(folder)]) == 0
    shown = capsys.readouterr().out
    lines = "\n".join(
        line.strip() for line in shown.splitlines() if line.startswith("  ") and (" = " in line or "[" in line)
    )
    config = config_from_toml(f'{lines}\n[model]\npath = "/m"', "printed", tmp_path)
    check_key_files(config.frontend)
    server = read_secret_file(folder / "server.key_secret")
    clients = {name: read_secret_file(folder / f"{name}.key_secret") for name in ("laptop", "ci")}
    assert {keys.server for keys in clients.values()} == {server.public}
    allowed = {path.name: read_public_file(path) for path in (folder / "clients").iterdir()}
    assert allowed == {f"{name}.key": keys.public for name, keys in clients.items()}
    assert all(str(folder / f"{name}.key_secret") in shown for name in clients)
    assert folder.stat().st_mode & 0o077 == 0


def test_more_clients_can_be_added_and_none_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["keys", "a", "--folder", str(tmp_path)]) == 0
    server = read_secret_file(tmp_path / "server.key_secret")
    assert cli.main(["keys", "b", "--folder", str(tmp_path)]) == 0
    assert read_secret_file(tmp_path / "b.key_secret").server == server.public
    before = (tmp_path / "a.key_secret").read_text()
    assert cli.main(["keys", "a", "--folder", str(tmp_path)]) == 2
    assert "a.key_secret exists: choose another NAME" in capsys.readouterr().err
    assert (tmp_path / "a.key_secret").read_text() == before


@pytest.mark.parametrize("name", ["server", "../a", "", "a b", "-x" * 40])
def test_names_that_cannot_be_files_are_refused(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["keys", "--folder", str(tmp_path), "--", name]) == 2
    assert f"NAME ({name!r}) must have" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
