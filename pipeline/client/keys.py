"""The keys by which a client and an engine at a TCP endpoint know each other (ZeroMQ's CURVE)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import zmq

from ipc.errors import ConfigError
from ipc.key_files import KeyPair, read_secret_file

KEY_FILE_VARIABLE: Final = "RINGFEED_KEY_FILE"


class ClientKeys:
    """The key file of one client. Without one, connections are neither encrypted nor authenticated.

    Args:
        endpoint: where the engine listens.
        key_file: a client's file of `ringfeed keys`; None = the file that the environment variable RINGFEED_KEY_FILE
            names, if the endpoint is a TCP address.

    Raises ConfigError for a file that cannot be used, and for a `key_file` with a Unix socket.
    """

    def __init__(self, endpoint: str, key_file: str | os.PathLike[str] | None) -> None:
        is_tcp = endpoint.startswith("tcp://")
        source = "key_file"
        if key_file is None and is_tcp:
            source, key_file = KEY_FILE_VARIABLE, os.environ.get(KEY_FILE_VARIABLE) or None
        self.path: str | None = None
        self._is_tcp = is_tcp
        self._keys: KeyPair | None = None
        if key_file is None:
            return
        if not isinstance(key_file, str | os.PathLike):
            raise ConfigError(f"key_file ({key_file!r}) must be the path of a file that `ringfeed keys` has made")
        if not is_tcp:
            raise ConfigError(
                f"key_file ({os.fspath(key_file)!r}) has no use at {endpoint}: only tcp:// endpoints have keys; leave "
                "it out"
            )
        self.path = os.path.abspath(Path(key_file).expanduser())
        try:
            self._keys = read_secret_file(self.path)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None
        if not self._keys.server:
            raise ConfigError(
                f'{source}: {self.path} has no server-key: add the line `server-key = "..."` with the engine\'s public '
                "key, or give a client's file of `ringfeed keys`"
            )

    def apply(self, socket: zmq.Socket[Any]) -> None:
        """Set the keys of a socket that has not connected yet."""
        if self._keys is not None:
            socket.setsockopt(zmq.CURVE_SERVERKEY, self._keys.server)
            socket.setsockopt(zmq.CURVE_PUBLICKEY, self._keys.public)
            socket.setsockopt(zmq.CURVE_SECRETKEY, self._keys.secret)

    def explain(self, event: int) -> str:
        """Why a handshake has probably failed, with the cure. "" if keys cannot be the reason.

        `event`: of the socket's monitor. An engine that uses keys breaks off the handshake of a client that has none,
        and a client breaks off that of an engine that has none; the other side may only see the connection's end.
        """
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            return f"it refuses the key of {self.path}: add the client's NAME.key to its frontend.client_keys_folder"
        if self._keys is not None:
            return f"it does not know the server-key of {self.path}, or uses no keys: give its own key_file, or none"
        return "it may use keys: give key_file, a file that `ringfeed keys` has made" if self._is_tcp else ""
