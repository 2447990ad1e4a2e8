"""The distribution, built, installed and used where no checkout is in sight."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
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
    for name in ("pyproject.toml", "README.md", "LICENSE", "ringfeed.py"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (built,) = out.glob("ringfeed-*.whl")
    return built


def test_the_wheel_holds_the_three_packages_and_the_command(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"ipc", "workers", "pipeline", "ringfeed.py"}
    (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
    assert "ringfeed = ringfeed:main" in zipfile.ZipFile(wheel).read(entry_points).decode()


def test_an_installed_engine_serves_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", str(site)]
    subprocess.run([*command, str(wheel)], check=True, timeout=120)
    config = tmp_path / "tiny.toml"
    shutil.copy(ROOT / "configs" / "tiny.toml", config)
    (tmp_path / "tiny-model").symlink_to(ROOT / "configs" / "tiny-model")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(site=str(site), config=str(config))],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)}, text=True, capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.stdout == "5 length\n", done.stderr
