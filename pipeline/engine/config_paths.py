"""The files and folders that a configuration names, as absolute paths. A hub id is left as it is."""

from __future__ import annotations

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
    try:
        local = (folder / Path(path).expanduser()).resolve()
        is_file = local.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"({path!r}) cannot be a file: {getattr(error, 'strerror', None) or error}") from None
    if not is_file:
        raise ValueError(f"({path!r}) must be a file; there is none at {local}")
    return str(local)
