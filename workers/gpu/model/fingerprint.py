"""Digests that tell one model's folder from another, without reading the weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ipc.errors import ConfigError
from workers.gpu.config import ModelConfig
from workers.gpu.model.weight_files import weight_files


def fingerprint(model: ModelConfig) -> tuple[str, str]:
    """SHA-256 of `config.json`, and of the names and sizes of the weight files; "" where none are read.

    Weights of the same sizes have the same digest, even if their values differ. Raises ConfigError if a file is
    missing.
    """
    if model.load_format == "null":
        return "", ""
    folder = Path(model.path)
    try:
        config = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"model.path ({model.path!r}): config.json cannot be read: {error.strerror}") from None
    if model.load_format == "dummy":
        return config, ""
    sizes = "\n".join(f"{file.name} {file.stat().st_size}" for file in weight_files(folder))
    return config, hashlib.sha256(sizes.encode()).hexdigest()
