"""Chooses the weight files of a model's folder and checks that they exist. Uses neither torch nor transformers.

The launcher calls this before it starts anything, and the GPU process when it loads, so both choose the same weights.
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
_MAX_POINTER_BYTES: Final = 1024  # Git LFS's limit
_OTHER_CONTENTS: Final = (  # other kinds of model folders: a pattern that identifies the kind, and the cure
    ("adapter_config.json", "it holds an adapter: merge that into its base model, and give the merged model's folder"),
    ("snapshots/*/config.json", "it is a folder of the hub's cache: give the hub id, or the folder in its snapshots"),
    ("*.gguf", "it holds GGUF files, which are not read: use the model's safetensors"),
    ("*-of-*.safetensors", f"it holds parts of the weights without their index: download {_INDEX} too"),
    (
        "*.safetensors",
        f"only {_WEIGHTS}, or the files that {_INDEX} lists, are read: rename the file, or add the index",
    ),
    ("*.bin", "it holds PyTorch's .bin files, which are not read: save the model as safetensors, with transformers"),
    ("*/config.json", "give the folder in it that holds the model"),
)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: model.safetensors if it exists, else those of the index, as in transformers.

    Raises ConfigError, naming the first file that is missing or is only a Git LFS pointer.
    """
    files = [folder / _WEIGHTS]
    index = folder / _INDEX
    is_listed = not files[0].is_file() and index.is_file()
    if is_listed:
        check_pointers([index])
        try:
            names = set(json.loads(index.read_bytes())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            names = set()
        if not names or not all(isinstance(name, str) and name and name.isprintable() for name in names):
            raise ConfigError(f"model.path ({str(folder)!r}): {index.name} has no weight_map that lists files")
        files = sorted(folder / name for name in names)
    missing = [file for file in files if not file.is_file()]
    if missing:
        if is_listed or missing[0].is_symlink():  # a link into the hub's cache
            cure = "download the model again"
        else:
            cure = other_contents(folder) or 'only safetensors are read; model.load_format = "dummy" gives random ones'
        raise ConfigError(
            f"model.path ({str(folder)!r}): the folder lacks weights ({missing[0].name}"
            f"{', ...' if missing[1:] else ''}): {cure}"
        )
    check_pointers(files)
    return files


def other_contents(folder: Path) -> str | None:
    """Return what a folder holds instead of a model that we can read, and the cure; None if it holds nothing known."""
    return next((cure for pattern, cure in _OTHER_CONTENTS if next(folder.glob(pattern), None) is not None), None)


def check_pointers(files: Iterable[Path]) -> None:
    """Raise ConfigError for a file that is only a Git LFS pointer, as a clone without git-lfs leaves it."""
    for file in files:
        try:
            if file.stat().st_size > _MAX_POINTER_BYTES:
                continue
            start = file.read_bytes()[: len(_POINTER)]
        except OSError:
            continue  # the code that needs the file reports it
        if start == _POINTER:
            raise ConfigError(
                f"model.path ({str(file.parent)!r}): {file.name} is only a Git LFS pointer to the file: run "
                f"`git lfs pull` in that folder, or download the model again"
            )
