"""The files and folders that a configuration names, as absolute paths. A hub id is left as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def model_path(path: str, folder: Path) -> str:
    """`model.path` as an absolute path if it is a folder, seen from `folder`, or can be nothing else.

    Raises ValueError with value and rule: "('') must be a folder or a hub id".
    """
    if path == "":
        raise ValueError("('') must be a folder or a hub id")
    try:
        local = (folder / Path(path).expanduser()).resolve()
        is_folder = local.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user's home, a NUL byte
        raise ValueError(f"({path!r}) cannot be a folder: {getattr(error, 'strerror', None) or error}") from None
    return str(local) if is_folder or path.startswith((".", "/", "~")) else path


def file_path(path: str, folder: Path) -> str:
    """A file, seen from `folder`, as an absolute path. Raises ValueError with value and rule if there is none."""
    return _existing(path, folder, "a file", Path.is_file)


def folder_path(path: str, folder: Path) -> str:
    """The same for a folder."""
    return _existing(path, folder, "a folder", Path.is_dir)


def _existing(path: str, folder: Path, what: str, exists: Callable[[Path], bool]) -> str:
    try:
        local = (folder / Path(path).expanduser()).resolve()
        is_there = exists(local)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"({path!r}) cannot be {what}: {getattr(error, 'strerror', None) or error}") from None
    if not is_there:
        raise ValueError(f"({path!r}) must be {what}; there is none at {local}")
    return str(local)
