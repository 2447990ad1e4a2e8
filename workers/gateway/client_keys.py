"""Decides which clients finish the handshake of a TCP endpoint: those whose public keys lie in a folder.

libzmq does CURVE's cryptography, and asks about each client's key over ZAP (https://rfc.zeromq.org/spec/27). The
gateway's own loop answers, so a key is known or refused in the time of one turn.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any, Final

import zmq
from zmq.utils import z85

from ipc.errors import ConfigError
from ipc.key_files import PUBLIC_SUFFIX, read_public_file, read_secret_file
from workers.gateway.config import FrontendConfig

logger = logging.getLogger(__name__)

RELOAD_S: Final = 1.0  # a change of the folder takes effect within this time
_ZAP_ENDPOINT: Final = "inproc://zeromq.zap.01"
_ZAP_VERSION: Final = b"1.0"
_ZAP_DOMAIN: Final = b"ringfeed"  # with a domain, libzmq refuses all clients if nobody answers
_MAX_REQUESTS: Final = 64  # answered in one turn
_LOG_EVERY_S: Final = 10.0


class AllowedKeys:
    """The public keys of a folder's files `NAME.key`. The folder may change: its files are read again.

    Raises ConfigError if the folder has no key, or a file of it cannot be read. Later such a file is only logged, and
    its key is not allowed.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._next_look = time.monotonic() + RELOAD_S
        self._seen = _fingerprint(folder)
        self._names = {read_public_file(path): Path(path).stem for path, _ in self._seen}
        if not self._names:
            raise ConfigError(
                f"{folder} has no file NAME{PUBLIC_SUFFIX}, so no client could connect: run `ringfeed keys`"
            )

    def name_of(self, key: bytes) -> str | None:
        """The name of the client with this public key (40 characters of Z85). None if it may not connect."""
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + RELOAD_S
            self._look()
        return self._names.get(key)

    def _look(self) -> None:
        try:
            seen = _fingerprint(self._folder)
        except ConfigError as error:
            logger.error("no client may connect: frontend.client_keys_folder: %s", error)
            self._names, self._seen = {}, frozenset()
            return
        if seen == self._seen:
            return
        self._seen, self._names = seen, {}
        for path, _ in seen:
            try:
                self._names[read_public_file(path)] = Path(path).stem
            except ConfigError as error:
                logger.error("this client may not connect: frontend.client_keys_folder: %s", error)
        logger.info("clients that may connect: %s", ", ".join(sorted(self._names.values())) or "none")


class Curve:
    """The server's side of CURVE on one socket: its keys, and the answers to libzmq's questions about clients.

    Raises ConfigError for key files that cannot be used. `requests` is the socket to watch; then call `answer`.
    """

    def __init__(self, context: zmq.Context[Any], server_key_file: str, client_keys_folder: str) -> None:
        self._keys = read_secret_file(server_key_file)
        self.allowed = AllowedKeys(client_keys_folder)
        self.requests: zmq.Socket[Any] = context.socket(zmq.ROUTER)
        self.requests.setsockopt(zmq.LINGER, 0)
        self.requests.bind(_ZAP_ENDPOINT)
        self._next_log = 0.0
        self._num_refused = 0

    def apply(self, socket: zmq.Socket[Any]) -> None:
        """Require keys at the endpoints that the socket binds from now on."""
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._keys.secret)
        socket.setsockopt(zmq.ZAP_DOMAIN, _ZAP_DOMAIN)

    def answer(self) -> None:
        """Answer the questions that have arrived."""
        for _ in range(_MAX_REQUESTS):
            try:
                frames = self.requests.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            # [session, "", version, request id, domain, address, identity, mechanism, credentials...]
            session, request_id, address, mechanism, credentials = (
                frames[0],
                frames[3],
                frames[5],
                frames[7],
                frames[8:],
            )
            key = _z85(credentials[0]) if mechanism == b"CURVE" and len(credentials) == 1 else b""
            is_allowed = self.allowed.name_of(key) is not None
            if not is_allowed:
                self._log_refusal(key, address)
            status = (b"200", b"OK", key) if is_allowed else (b"400", b"this key is not allowed", b"")
            self.requests.send_multipart((session, b"", _ZAP_VERSION, request_id, *status, b""))

    def _log_refusal(self, key: bytes, address: bytes) -> None:
        self._num_refused += 1
        if time.monotonic() >= self._next_log:
            self._next_log = time.monotonic() + _LOG_EVERY_S
            logger.warning(
                "refusing a client at %s: its public key %r is not in frontend.client_keys_folder (%d refused so far)",
                address.decode(errors="replace"), key.decode(), self._num_refused,
            )  # fmt: skip


def check_key_files(frontend: FrontendConfig) -> None:
    """Raise ConfigError if an engine could not use its key files. Without keys there is nothing to check."""
    if frontend.server_key_file is None or frontend.client_keys_folder is None:
        return
    try:
        read_secret_file(frontend.server_key_file)
    except ConfigError as error:
        raise ConfigError(f"frontend.server_key_file: {error}") from None
    try:
        AllowedKeys(frontend.client_keys_folder)
    except ConfigError as error:
        raise ConfigError(f"frontend.client_keys_folder: {error}") from None


def _fingerprint(folder: str) -> frozenset[tuple[str, tuple[int, int, int]]]:
    """The paths of all key files, each with what changes when the file does."""
    found = set()
    try:
        for entry in os.scandir(folder):
            if entry.name.endswith(PUBLIC_SUFFIX):
                status = entry.stat()
                found.add((entry.path, (status.st_ino, status.st_mtime_ns, status.st_size)))
    except OSError as error:
        raise ConfigError(f"{error.filename or folder} cannot be read: {error.strerror}") from None
    return frozenset(found)


def _z85(key: bytes) -> bytes:
    """A key of 32 bytes as 40 characters (https://rfc.zeromq.org/spec/32)."""
    encoded: bytes = z85.encode(key)
    return encoded
