"""Finds ringfeed's own packages, wherever they are installed, even if the user's code has the same names.

Our names are `ipc`, `workers` and `pipeline`. A user's `ipc.py` may come before ours on `sys.path`. Neither this
process nor its child processes may import it in place of ours. A warning names each module of the user that we hide.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
import warnings
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Final

_HOUSE: Final = Path(__file__).resolve().parents[2]  # the folder that holds ipc, workers and pipeline
_PACKAGES: Final = ("ipc", "workers", "pipeline")


def module_command(module: str, *arguments: str) -> list[str]:
    """The command line that runs a module. With -P, Python does not search the current folder for our packages."""
    return [sys.executable, "-P", "-m", module, *arguments]


def module_environment() -> dict[str, str]:
    """The environment in which a child process finds the same packages as this process.

    A checkout comes first on PYTHONPATH. An installation in site-packages needs no entry, unless a folder on PYTHONPATH
    has a module with one of our names.
    """
    environment = dict(os.environ)
    folders = environment.get("PYTHONPATH", "").split(os.pathsep)
    standard = {os.path.realpath(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    is_hidden = any(PathFinder.find_spec(name, list(filter(None, folders))) is not None for name in _PACKAGES)
    if str(_HOUSE) not in standard or is_hidden:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_HOUSE), *folders)))
    return environment


def own_package(name: str) -> None:
    """Make `import NAME` find our package in this process. Warns if this hides a module of the user.

    Raises ImportError, naming the user's file, if that module has been imported already.
    """
    module = sys.modules.get(name)
    if module is not None:
        if not _is_ours(name, module.__spec__.origin if module.__spec__ else None):
            raise ImportError(
                f"ringfeed has a package {name!r}, and {_where(module)} was imported under that name: rename that file"
            )
        return
    found = importlib.util.find_spec(name)
    if found is not None and _is_ours(name, found.origin):
        return
    _load(name)
    if found is not None and found.origin is not None:
        warnings.warn(
            f"{found.origin} has the name of one of ringfeed's packages: from now on `import {name}` gives ringfeed's; "
            "rename that file",
            RuntimeWarning,
            stacklevel=3,
        )


def _load(name: str) -> None:
    folder = _HOUSE / name
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None, "a package of ours is a folder of Python files"
    assert spec.loader is not None, "the same"
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def _is_ours(name: str, origin: str | None) -> bool:
    return origin is not None and Path(origin).resolve() == _HOUSE / name / "__init__.py"


def _where(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or f"a folder {', '.join(getattr(module, '__path__', []))}"
