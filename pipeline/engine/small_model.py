"""Finds the configuration of the small model that comes with ringfeed, in a checkout or an installation."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_PACKAGE: Final = Path(__file__).parent.parent
_INSTALLED: Final = _PACKAGE / "configs"  # setup.py copies it there

CONFIG: Final = (_INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "configs") / "tiny.toml"
