"""CURVE key files: reads and writes ZeroMQ's certificates, the files that `zmq.auth.create_certificates` writes too.

`NAME.key` has a public key. `NAME.key_secret` has a secret key as well, and only its owner may read it. A client's
secret file may also name the server's public key, as `server-key` in its metadata, so that a client needs one file.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Final, NamedTuple

import zmq

from ipc.errors import ConfigError

PUBLIC_SUFFIX: Final = ".key"
SECRET_SUFFIX: Final = ".key_secret"
_MAX_FILE_BYTES: Final = 64 << 10
_ENTRY: Final = re.compile(r"""^\s*(public-key|secret-key|server-key)\s*=\s*["']?([!-~]{40})["']?\s*$""", re.MULTILINE)


class KeyPair(NamedTuple):
    """Keys of one party in Z85, 40 characters each. `server`: the public key of its server; b"" = none."""

    public: bytes
    secret: bytes
    server: bytes = b""


def make_key_pair(server: bytes = b"") -> KeyPair:
    """A new random key pair."""
    public, secret = zmq.curve_keypair()
    return KeyPair(public, secret, server)


def read_secret_file(path: str | os.PathLike[str]) -> KeyPair:
    """The keys of a secret file. Raises ConfigError, whose text begins with the path."""
    shown = os.fspath(path)
    text, mode = _read(path)
    if mode & 0o077:
        raise ConfigError(
            f"{shown} has a secret key, and its mode {mode:04o} lets others read it: run chmod 600 {shown}"
        )
    keys = _entries(text)
    missing = [name for name in ("public-key", "secret-key") if name not in keys]
    if missing:
        raise ConfigError(f"{shown} has no {' and no '.join(missing)}: give a file that `ringfeed keys` has made")
    pair = KeyPair(keys["public-key"], keys["secret-key"], keys.get("server-key", b""))
    if _public_of(pair.secret) != pair.public:
        raise ConfigError(f"{shown}: its public-key does not belong to its secret-key: make a new pair")
    return pair


def read_public_file(path: str | os.PathLike[str]) -> bytes:
    """The public key of a certificate. Raises ConfigError, whose text begins with the path."""
    text, _ = _read(path)
    key = _entries(text).get("public-key")
    if key is None:
        raise ConfigError(f"{os.fspath(path)} has no public-key: give a file that `ringfeed keys` has made")
    return key


def write_secret_file(path: Path, keys: KeyPair) -> None:
    """Make a secret file with mode 0600. Raises FileExistsError if there is one."""
    server = f'    server-key = "{keys.server.decode()}"\n' if keys.server else ""
    lines = f'    public-key = "{keys.public.decode()}"\n    secret-key = "{keys.secret.decode()}"\n'
    _write(path, f"# A secret key: keep this file to yourself.\nmetadata\n{server}curve\n{lines}", 0o600)


def write_public_file(path: Path, public: bytes) -> None:
    """Make a certificate of a public key. Raises FileExistsError if there is one."""
    _write(path, f'# A public key.\nmetadata\ncurve\n    public-key = "{public.decode()}"\n', 0o644)


def _write(path: Path, text: str, mode: int) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        file.write(text)


def _read(path: str | os.PathLike[str]) -> tuple[str, int]:
    """The text and the permissions of a file."""
    try:
        with open(path, "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            return file.read(_MAX_FILE_BYTES).decode(), mode
    except OSError as error:
        raise ConfigError(f"{os.fspath(path)} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, ValueError):
        raise ConfigError(f"{os.fspath(path)} is not a key file: give a file that `ringfeed keys` has made") from None


def _entries(text: str) -> dict[str, bytes]:
    """The keys that a certificate names. What is not a key in Z85 is left out."""
    return {name: value.encode() for name, value in _ENTRY.findall(text) if _public_of(value.encode())}


def _public_of(secret: bytes) -> bytes | None:
    """The public key that belongs to 40 characters as a secret key. None if they are not a key in Z85."""
    try:
        public: bytes = zmq.curve_public(secret)
    except (zmq.ZMQError, ValueError):
        return None
    return public
