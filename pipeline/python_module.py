"""How this package starts Python modules of its own house in new processes, wherever it is installed."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path
from typing import Final

_HOUSE: Final = Path(__file__).resolve().parent.parent  # the folder that holds ipc, workers and pipeline


def module_command(module: str, *arguments: str) -> list[str]:
    """The command line. -P: a folder named like one of our packages in the user's own must not be taken for it."""
    return [sys.executable, "-P", "-m", module, *arguments]


def module_environment() -> dict[str, str]:
    """The environment in which it finds the same packages as this process: a checkout comes before everything else."""
    environment = dict(os.environ)
    if str(_HOUSE) not in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_HOUSE), environment.get("PYTHONPATH"))))
    return environment
