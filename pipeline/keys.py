"""`ringfeed keys`: makes the key pairs of a TCP endpoint and says which line goes where."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ipc.errors import ConfigError, InvalidRequest
from ipc.key_files import (
    PUBLIC_SUFFIX,
    SECRET_SUFFIX,
    KeyPair,
    make_key_pair,
    read_secret_file,
    write_public_file,
    write_secret_file,
)
from pipeline.cli import run_module
from pipeline.client.keys import KEY_FILE_VARIABLE

_SERVER: Final = "server"
_CLIENTS: Final = "clients"
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,63}")
_EXAMPLES: Final = """\
examples:
  ringfeed keys                                    a key pair for the engine and one for a client
  ringfeed keys laptop ci --folder /etc/ringfeed   two clients; run it again with other names to add clients

Files of --folder (existing files are never replaced):
  server.key_secret      the engine's keys: frontend.server_key_file
  server.key             the engine's public key
  clients/NAME.key       the public keys of clients that may connect: frontend.client_keys_folder
  NAME.key_secret        a client's keys, with the engine's public key: move it to the client
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m pipeline.keys`. Returns the exit status."""
    return run_module("keys", "python -m pipeline.keys", arguments)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ringfeed keys`."""
    parser.epilog = _EXAMPLES
    parser.set_defaults(run=run)
    parser.add_argument("names", nargs="*", default=["client"], metavar="NAME", help="names of clients, one pair each")
    parser.add_argument(
        "--folder", type=Path, default=Path("ringfeed-keys"), help="where the files lie; made if missing"
    )


def run(options: argparse.Namespace) -> None:
    """Make the missing key pairs and print how to use them. Raises RingfeedError."""
    for name in options.names:
        if not _NAME.fullmatch(name) or name == _SERVER:
            raise InvalidRequest(
                f'NAME ({name!r}) must have 1 to 64 letters, digits or "_.@-", begin with a letter, a digit or "_", '
                f'and not be "{_SERVER}"'
            )
    folder: Path = options.folder.expanduser().resolve()
    try:
        made = [_make_client(folder, name, _make_server(folder)) for name in options.names]
    except OSError as error:
        raise ConfigError(f"--folder {folder}: {error.filename} cannot be written: {error.strerror}") from None
    print(f"""\
Start the engine with these lines in its configuration, and a port of your choice:

  [frontend]
  endpoint = "tcp://*:5757"
  server_key_file = "{folder / _SERVER}{SECRET_SUFFIX}"
  client_keys_folder = "{folder / _CLIENTS}"

Move each client's file to its machine, readable by its user only:
""")
    for path in made:
        print(f"  {path}")
    print(f"""
A client uses its file by name, or by the environment variable {KEY_FILE_VARIABLE}:

  Client("tcp://HOST:5757", key_file="{made[0].name}")
  {KEY_FILE_VARIABLE}={made[0].name} ringfeed metrics --endpoint tcp://HOST:5757""")


def _make_server(folder: Path) -> KeyPair:
    """The engine's keys, made if there are none."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / _CLIENTS).mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{_SERVER}{SECRET_SUFFIX}"
    if path.exists():
        return read_secret_file(path)
    keys = make_key_pair()
    write_secret_file(path, keys)
    write_public_file(folder / f"{_SERVER}{PUBLIC_SUFFIX}", keys.public)
    return keys


def _make_client(folder: Path, name: str, server: KeyPair) -> Path:
    """A client's keys. Raises ConfigError if the client has some already."""
    secret, public = folder / f"{name}{SECRET_SUFFIX}", folder / _CLIENTS / f"{name}{PUBLIC_SUFFIX}"
    for path in (secret, public):
        if path.exists():
            raise ConfigError(
                f"{path} exists: choose another NAME, or remove the file to make new keys for this client"
            )
    keys = make_key_pair(server.public)
    write_secret_file(secret, keys)
    write_public_file(public, keys.public)
    return secret


if __name__ == "__main__":
    sys.exit(main())
