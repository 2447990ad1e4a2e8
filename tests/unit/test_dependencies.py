"""Every package that the code imports is declared in pyproject.toml, and the engine imports what it declares."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
ENGINE_NEEDS = PROJECT["dependencies"] + EXTRAS["plot"] + EXTRAS["tracing"]
OWN = {"ipc", "workers", "pipeline", "tests", "ringfeed"}
UNDECLARED = {
    "triton": "builds of torch for CUDA bring it",
    "vllm": "is measured beside ringfeed, in an environment of its own",
}
ENGINE = ("ipc", "workers", "pipeline", "ringfeed.py")
CLIENTS = ROOT / "tests" / "clients"  # has requirements of its own

distributions_of = cache(packages_distributions)


def declared(requirements: list[str]) -> set[str]:
    """The normalised names of distributions."""
    return {re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", each)[0]).lower() for each in requirements}


@cache
def imported(place: str) -> set[str]:
    """Packages that are neither Python's nor ours, and that a module imports anywhere in its code."""
    names: set[str] = set()
    for path in (ROOT / place).rglob("*.py") if (ROOT / place).is_dir() else [ROOT / place]:
        if CLIENTS in path.parents:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(str(node.module).split(".")[0])
    return names - sys.stdlib_module_names - OWN - set(UNDECLARED)


@pytest.mark.parametrize(
    ("place", "requirements"),
    [*((place, ENGINE_NEEDS) for place in ENGINE), ("tests", ENGINE_NEEDS + EXTRAS["dev"])],
    ids=[*ENGINE, "tests"],
)
def test_every_imported_package_is_declared(place: str, requirements: list[str]) -> None:
    known = declared(requirements)
    assert {name for name in imported(place) if not declared(distributions_of().get(name, [name])) & known} == set()


def test_every_dependency_of_the_engine_is_imported() -> None:
    names = set[str]().union(*map(imported, ENGINE))
    used = {distribution for name in names for distribution in declared(distributions_of().get(name, [name]))}
    assert declared(PROJECT["dependencies"]) - used == set()
