"""Which files of a model's folder are read, and whether they are there. Knows neither torch nor transformers.

The launcher asks before it starts anything, and the GPU process when it loads: both choose the same weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from ipc.errors import ConfigError

_WEIGHTS: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
_POINTER: Final = b"version https://git-lfs.github.com/spec/"
_MAX_POINTER_BYTES: Final = 1024  # as Git LFS has it


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: one for all if there is one, else those of the index, as transformers chooses.

    Raises ConfigError, naming the first file that is missing or only points to itself.
    """
    files = [folder / _WEIGHTS]
    index = folder / _INDEX
    if not files[0].is_file() and index.is_file():
        check_pointers([index])
        try:
            files = sorted({folder / name for name in json.loads(index.read_bytes())["weight_map"].values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            files = []
        if not files:
            raise ConfigError(f"model.path ({str(folder)!r}): {index.name} has no weight_map")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ConfigError(
            f"model.path ({str(folder)!r}): the folder lacks weights ({missing[0]}{', ...' if missing[1:] else ''}); "
            'only safetensors are read. Set model.load_format = "dummy" for random ones'
        )
    check_pointers(files)
    return files


def check_pointers(files: Iterable[Path]) -> None:
    """Raise ConfigError for a file that is only a Git LFS pointer, as a clone without git-lfs leaves it."""
    for file in files:
        try:
            if file.stat().st_size > _MAX_POINTER_BYTES:
                continue
            start = file.read_bytes()[: len(_POINTER)]
        except OSError:
            continue  # whoever needs it says so
        if start == _POINTER:
            raise ConfigError(
                f"model.path ({str(file.parent)!r}): {file.name} is only a Git LFS pointer to the file: run "
                f"`git lfs pull` in that folder, or download the model again"
            )
