"""Endpoints: their syntax, the default endpoint, and an engine's claim to listen on one.

ZeroMQ removes a socket file at its endpoint, even if another engine listens on it. So an engine first claims its
endpoint with a lock in the kernel's abstract socket namespace. The kernel frees the lock when all its holders end.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import ipaddress
import os
import re
import socket
import stat
import time
from pathlib import Path
from typing import Final

from ipc.channels import MAX_IPC_PATH_BYTES
from ipc.errors import ConfigError, EngineUnavailable

PATIENCE_S: Final = 2.0  # the gateway of a killed engine answers its open requests before it frees the endpoint
_POLL_S: Final = 0.02
_MAX_FOLDER_BYTES: Final = MAX_IPC_PATH_BYTES // 2  # leaves room for the names of folders and sockets in it
_IPC: Final = "ipc://"
_TCP: Final = re.compile(r"tcp://(?P<host>\[[^\]]+\]|[^:\[\]/]+):(?P<port>[0-9]{1,5})")


def runtime_folder() -> Path:
    """This user's folder for sockets: XDG_RUNTIME_DIR if that folder's name can be part of an endpoint, else /tmp."""
    folder = os.environ.get("XDG_RUNTIME_DIR", "")
    can_be_named = folder.startswith("/") and folder.isprintable() and len(os.fsencode(folder)) <= _MAX_FOLDER_BYTES
    is_usable = can_be_named and os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)
    return Path(folder if is_usable else "/tmp")


def default_endpoint() -> str:
    """The endpoint of an engine, and of a client, for which the user gives none."""
    return f"{_IPC}{_default_folder() / 'default.sock'}"


def own_folder(endpoint: str) -> Path | None:
    """The folder of an endpoint if it is this user's folder for engines, to be removed when empty; else None."""
    folder = _default_folder()
    return folder if Path(endpoint.removeprefix(_IPC)).parent == folder else None


def _default_folder() -> Path:
    return runtime_folder() / f"ringfeed-{os.getuid()}"


def check_endpoint(endpoint: str) -> None:
    """Raise ConfigError if no engine can listen there. Its text continues the sentence `endpoint (...) ...`."""
    if endpoint.startswith(_IPC):
        path = endpoint.removeprefix(_IPC)
        if not path.startswith("/") or path.endswith("/") or not path.isprintable():
            raise ConfigError(
                'must name a file by its absolute path, in printable characters: "ipc:///folder/name.sock"'
            )
        if (num_bytes := len(os.fsencode(path))) > MAX_IPC_PATH_BYTES:
            raise ConfigError(
                f"is a path of {num_bytes} bytes, and a socket's path may have {MAX_IPC_PATH_BYTES}: shorten it"
            )
        return
    match = _TCP.fullmatch(endpoint)
    if match is None:
        raise ConfigError('must have the form "ipc:///folder/name.sock" or "tcp://address:port"')
    if not 1 <= int(match["port"]) <= 65_535:
        raise ConfigError("must have a port from 1 to 65535")
    host = match["host"].strip("[]")
    if host != "*" and host not in (name for _, name in socket.if_nameindex()):
        try:
            ipaddress.ip_address(host)
        except ValueError:
            raise ConfigError('must name an IP address of this machine ("127.0.0.1"), an interface, or "*"') from None


def is_private(endpoint: str) -> bool:
    """Whether only programs of this machine can connect: a Unix socket, or a loopback address given as a number."""
    match = _TCP.fullmatch(endpoint)
    if match is None:
        return True
    try:
        address = ipaddress.ip_address(match["host"].strip("[]"))
    except ValueError:  # "*", or an interface, whose addresses may change
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def check_client_endpoint(endpoint: object) -> str:
    """Raise ConfigError if no client can connect to this endpoint. Its host, unlike a listener's, may be a name."""
    is_text = isinstance(endpoint, str) and endpoint.isprintable()
    match = re.fullmatch(r"ipc:///.*[^/]|tcp://[^/]+:(?P<port>[0-9]{1,5})", str(endpoint)) if is_text else None
    if match is None or not 1 <= int(match["port"] or 1) <= 65_535:
        raise ConfigError(
            f'endpoint ({endpoint!r}) must have the form "ipc:///folder/name.sock" or "tcp://host:port"; without it, '
            "Client() finds this user's default engine"
        )
    return str(endpoint)


def no_engine(endpoint: str, timeout_s: float | None, is_default: bool, refusal: str = "") -> EngineUnavailable:
    """The error of a client that has found no engine within this time. `refusal`: why one there has refused it."""
    within = "" if timeout_s is None else f" within {timeout_s:g} s"
    if refusal:
        return EngineUnavailable(f"no connection to the engine at {endpoint}{within}: {refusal}")
    text = f"no engine answers at {endpoint}{within}: is it started, and is this its endpoint?"
    return EngineUnavailable(f"{text} {where_else(endpoint)}" if is_default else text)


def where_else(endpoint: str) -> str:
    """A hint for a client that finds no engine at its default endpoint: why this is the default, and which to use."""
    given = os.environ.get("XDG_RUNTIME_DIR")
    reason = f"is {given!r}" if given else "is not set"
    if given and runtime_folder() != Path(given):
        reason += " (not a folder that can be written to, or its name is too long or not printable)"
    text = f"It is the default where XDG_RUNTIME_DIR {reason}; an engine started with another value listens elsewhere"
    for folder in (f"/run/user/{os.getuid()}", "/tmp"):
        other = f"{_IPC}{folder}/ringfeed-{os.getuid()}/default.sock"
        if other != endpoint and os.path.exists(other.removeprefix(_IPC)):
            return f"{text}: there is {other}, which can be given as the endpoint."
    return f"{text}: give the endpoint that it logs."


def connectable(endpoint: str) -> str:
    """The endpoint by which a client on this machine reaches a listener: a wildcard cannot be connected to."""
    for wildcard, loopback in (("*", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("[::]", "[::1]")):
        if endpoint.startswith(f"tcp://{wildcard}:"):
            return endpoint.replace(wildcard, loopback, 1)
    return endpoint


class EndpointClaim:
    """The right to listen on a Unix socket, from construction until `close()`, or until all its holders have ended.

    `fd` goes to the process that listens. As long as that process holds it, no other engine can claim the endpoint. For
    tcp the kernel itself refuses a second listener. Makes a missing folder, private to the user. Raises ConfigError if
    another process still listens there after `patience_s`, or the folder is unsuitable.
    """

    def __init__(self, endpoint: str, patience_s: float = 0.0) -> None:
        self.fd: int | None = None
        self._path: Path | None = None
        self._owned_folder: Path | None = None
        path = Path(endpoint.removeprefix(_IPC))
        self._lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._take_lock(path, endpoint, time.monotonic() + patience_s)
            self._owned_folder = self._make_folder(
                path.parent, endpoint
            )  # the lock is held, so the last holder does not remove the folder any more
            self._refuse_foreign_file(path, endpoint)
        except BaseException:
            self._give_up()
            raise
        self._path = path
        self.fd = self._lock.fileno()

    def close(self) -> None:
        """Remove the endpoint's file and free the endpoint for others."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = self.fd = None
            self._give_up()

    def _give_up(self) -> None:
        self._lock.close()
        if self._owned_folder is not None:
            with contextlib.suppress(OSError):  # not empty: another engine of this user listens in it
                self._owned_folder.rmdir()

    def _take_lock(self, path: Path, endpoint: str, deadline: float) -> None:
        digest = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]
        while True:
            try:
                return self._lock.bind(f"\0ringfeed-{digest}")
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            if time.monotonic() >= deadline:
                raise ConfigError(f"frontend.endpoint ({endpoint}) is in use by another engine: {_CURE}")
            time.sleep(_POLL_S)

    @staticmethod
    def _make_folder(folder: Path, endpoint: str) -> Path | None:
        """Returns the folder if it must be removed with the claim."""
        where = f"frontend.endpoint ({endpoint})"
        try:
            folder.mkdir(mode=0o700)
            return folder
        except FileExistsError:
            status = folder.lstat()
            if folder == _default_folder():
                private = stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o077
                if not private or status.st_uid != os.getuid():
                    raise ConfigError(f"{where}: {folder} must be a private folder (0700) of this user") from None
                return folder
            if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
                raise ConfigError(f"{where}: {folder} is not a folder that this user may write to") from None
        except OSError as error:
            raise ConfigError(f"{where}: folder {folder} cannot be made: {error.strerror}") from None
        return None

    @staticmethod
    def _refuse_foreign_file(path: Path, endpoint: str) -> None:
        """Raise ConfigError if ZeroMQ would delete a file that is in use: it deletes anything at its endpoint."""
        try:
            status = path.lstat()
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(status.st_mode):
            raise ConfigError(f"frontend.endpoint ({endpoint}): {path} is a file and not a socket: {_CURE}")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            if probe.connect_ex(os.fsencode(path)) != errno.ECONNREFUSED:
                raise ConfigError(f"frontend.endpoint ({endpoint}) is in use by another process: {_CURE}")


_CURE: Final = "choose another endpoint, or end what uses this one"
