"""The distribution, built, installed and used where no checkout is in sight."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import ipc, pipeline, workers
from pathlib import Path
for package in (ipc, pipeline, workers):
    assert Path(package.__file__).is_relative_to({site!r}), package.__file__
with pipeline.Pipeline({config!r}, {{"model.load_format": "null"}}) as engine:
    output = engine.client.generate("A module is", pipeline.SamplingParams(max_tokens=5, ignore_eos=True))
print(len(output.token_ids), output.finish_reason)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no build folder lands in the checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("ipc", "workers", "pipeline"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "ringfeed.py", "setup.py"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "configs", source / "configs")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (built,) = out.glob("ringfeed-*.whl")
    return built


def test_the_wheel_holds_the_three_packages_and_the_command(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"ipc", "workers", "pipeline", "ringfeed.py"}
    assert "pipeline/http/page/index.html" in names
    (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
    assert "ringfeed = ringfeed:main" in zipfile.ZipFile(wheel).read(entry_points).decode()


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the wheel installs."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", str(folder)]
    subprocess.run([*command, str(wheel)], check=True, timeout=120)
    return folder


def run(*command: str, cwd: Path, path: str) -> subprocess.CompletedProcess[str]:
    """Run where no checkout is in sight."""
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True, timeout=120)


def test_the_wheel_holds_the_small_model_and_nothing_of_its_making(site: Path) -> None:
    installed = site / "pipeline" / "configs"
    assert {path.name for path in installed.iterdir()} == {"tiny.toml", "tiny-model"}
    made_with = {"train.py", "__pycache__"}
    expected = {path.name for path in (ROOT / "configs" / "tiny-model").iterdir()} - made_with
    assert {path.name for path in (installed / "tiny-model").iterdir()} == expected


def test_an_installed_engine_serves_outside_the_checkout(site: Path, tmp_path: Path) -> None:
    config = str(site / "pipeline" / "configs" / "tiny.toml")
    done = run(sys.executable, "-c", SCRIPT.format(site=str(site), config=config), cwd=tmp_path, path=str(site))
    assert done.stdout == "5 length\n", done.stderr


def test_the_installed_command_works_among_files_with_our_names(site: Path, tmp_path: Path) -> None:
    for name in ("ipc", "workers", "pipeline"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the user was taken for one of ringfeed')")
    config = str(site / "pipeline" / "configs" / "tiny.toml")
    path = os.pathsep.join((str(tmp_path), str(site)))
    done = run(str(site / "bin" / "ringfeed"), "--config", config, "--check", cwd=tmp_path, path=path)
    assert done.returncode == 0, done.stderr
    assert f'path = "{site}/pipeline/configs/tiny-model"' in done.stdout


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new virtual environment: the wheel is installed there, and our dependencies can be seen."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, symlinks=True, with_pip=False)
    python = str(folder / "bin" / "python")
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*command, str(wheel)], check=True, timeout=120)
    (site,) = folder.glob("lib/*/site-packages")
    dependencies = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "dependencies.pth").write_text("\n".join(dependencies))
    return folder / "bin"


@pytest.mark.slow
def test_pip_install_and_ringfeed_demo_work_without_a_checkout(clean: Path, tmp_path: Path) -> None:
    command = str(clean / "ringfeed")
    where = run(str(clean / "python"), "-c", "import pipeline; print(pipeline.__file__)", cwd=tmp_path, path="")
    assert where.stdout.startswith(str(clean.parent)), where.stderr
    assert run(command, "--version", cwd=tmp_path, path="").stdout.startswith("ringfeed 0.")
    done = run(command, "demo", "--num-requests", "4", "--max-tokens", "4", cwd=tmp_path, path="")
    assert done.returncode == 0, done.stderr
    assert "What the engine did" in done.stdout
    model = clean.parent.glob("lib/*/site-packages/pipeline/configs/tiny-model")
    answered = run(command, "chat", "--model", str(next(model)), "What is a list?", cwd=tmp_path, path="")
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.strip()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "arguments", "expected"),
    [
        ("demo", ["--num-requests", "4", "--max-tokens", "4"], "What the engine did"),
        ("bench", ["host", "--num-seqs", "2", "--step-ms", "1", "--seconds", "0.2"], "host benchmark"),
    ],
)
def test_what_needs_the_small_model_runs_from_the_wheel_in_an_empty_folder(
    site: Path, tmp_path: Path, module: str, arguments: list[str], expected: str
) -> None:
    done = run(sys.executable, "-m", f"pipeline.{module}", *arguments, cwd=tmp_path, path=str(site))
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    assert not list(tmp_path.iterdir())
