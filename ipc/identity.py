"""The identity of a process on every socket: its name and its epoch, `tokenizer.0@2`.

A process that is started again has its name and another identity.
"""

from __future__ import annotations


def identity_of(name: str, epoch: int) -> bytes:
    """Of the process that was started as the `epoch`th of this name."""
    return f"{name}@{epoch}".encode()


def name_of(identity: bytes) -> str:
    """The name of a process with this identity."""
    return identity.decode().rpartition("@")[0]
