"""Locates the configuration of the small model that comes with ringfeed."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_PACKAGE: Final = Path(__file__).parent.parent
_INSTALLED: Final = _PACKAGE / "configs"  # see setup.py

CONFIG: Final = (_INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "configs") / "tiny.toml"
