"""A user's own `pipeline.py`, `workers` or `ipc.py` in front of ours on sys.path."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.environment import module_search
from pipeline.environment.module_search import module_command, module_environment

ROOT = Path(__file__).parents[4]
CONFIG = ROOT / "configs" / "tiny.toml"
FOREIGN = 'raise SystemExit("a file of the user was taken for one of ringfeed")\n'


@pytest.fixture(params=["files", "packages"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A user's folder, with all our names in it."""
    for name in ("ipc", "workers", "pipeline"):
        if request.param == "files":
            (tmp_path / f"{name}.py").write_text(FOREIGN)
        else:
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text(FOREIGN)
    return tmp_path


def run(*arguments: str, cwd: Path, path: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60
    )


def script(folder: Path, text: str, pipeline_is_ours: bool = True) -> subprocess.CompletedProcess[str]:
    """Run as a file of the folder, which Python then puts first on sys.path."""
    if pipeline_is_ours:
        for path in (folder / "pipeline.py", folder / "pipeline" / "__init__.py"):
            path.unlink(missing_ok=True)
    (folder / "script.py").write_text(text)
    return run("script.py", cwd=folder, path=str(ROOT))


def test_what_we_start_finds_our_packages_whatever_lies_in_the_way(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for path in (str(folder), f"{os.pathsep}{folder}", "."):
        monkeypatch.setenv("PYTHONPATH", path)
        for module in ("workers.gateway", "pipeline.launch"):
            done = subprocess.run(
                module_command(module, "--help"), env=module_environment(), capture_output=True, text=True, timeout=60
            )
            assert done.returncode == 0, done.stderr
            assert done.stderr == ""


def test_an_installed_package_comes_before_a_folder_only_if_that_has_one_of_our_names(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(module_search._HOUSE))
    monkeypatch.setenv("PYTHONPATH", str(other))
    assert module_environment()["PYTHONPATH"] == str(other)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(other), str(folder))))
    assert module_environment()["PYTHONPATH"] == os.pathsep.join((str(ROOT), str(other), str(folder)))
    monkeypatch.delenv("PYTHONPATH")
    assert "PYTHONPATH" not in module_environment()


def test_a_script_beside_such_files_gets_ours_and_is_told(folder: Path) -> None:
    done = script(folder, "import pipeline\npipeline.Client, pipeline.Pipeline\nimport ipc, workers\nprint('works')\n")
    assert done.stdout == "works\n", done.stderr
    told = [line for line in done.stderr.splitlines() if "RuntimeWarning: " in line]
    assert len(told) == 2
    for name, line in zip(("ipc", "workers"), told, strict=True):
        assert f"RuntimeWarning: {folder}/{name}" in line
        assert f"has the name of one of ringfeed's packages: from now on `import {name}` gives ringfeed's" in line


def test_a_command_beside_such_files_works_and_says_what_is_hidden(folder: Path) -> None:
    for path in (folder / "pipeline.py", folder / "pipeline" / "__init__.py"):
        path.unlink(missing_ok=True)
    done = run("-m", "pipeline.launch", "--config", str(CONFIG), "--check", cwd=folder, path=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert f"RuntimeWarning: {folder}/ipc" in done.stderr


@pytest.mark.parametrize("name", ["ipc", "workers"])
def test_a_file_that_was_imported_under_our_name_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.py").write_text("")
    done = script(tmp_path, f"import {name}\nfrom pipeline import Pipeline\n")
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: ringfeed has a package '{name}', and {tmp_path}/{name}.py was imported under that name: "
        "rename that file"
    )


def test_a_client_leaves_the_users_own_workers_alone(tmp_path: Path) -> None:
    (tmp_path / "workers.py").write_text("mine = 1\n")
    done = script(tmp_path, "from pipeline import Client\nimport workers\nprint(workers.mine)\n")
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_the_ringfeed_command_works_where_even_pipeline_is_hidden(folder: Path) -> None:
    path = os.pathsep.join((str(folder), str(ROOT)))
    code = "import sys\nfrom ringfeed import main\nsys.exit(main())"
    done = run("-c", code, "--config", str(CONFIG), "--check", cwd=folder, path=path)
    assert done.returncode == 0, done.stderr
    assert "[frontend]" in done.stdout
