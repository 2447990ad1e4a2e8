"""The engine's handling of `ulimit -n`."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.environment.module_search import module_environment

ROOT = Path(__file__).parents[4]
RAISE = """
import resource
from pipeline.environment.descriptors import raise_descriptor_limit
raise_descriptor_limit()
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def run(soft: int, hard: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=module_environment(), cwd=ROOT, capture_output=True, text=True, timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)),
    )  # fmt: skip


@pytest.mark.parametrize("limit", [12, 32, 64, 128])
def test_too_few_descriptors_for_an_engine_are_one_clear_line(limit: int) -> None:
    done = run(limit, limit, "-m", "pipeline.launch", "--config", "configs/tiny.toml")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: this engine needs 176 more descriptors, and this process can open ")
    assert f"ulimit -n is {limit}: " in line
    assert line.endswith("or raise the limit")


def test_the_soft_limit_is_raised_to_the_hard_one() -> None:
    assert run(64, 512, "-c", RAISE).stdout == "512 512\n"
