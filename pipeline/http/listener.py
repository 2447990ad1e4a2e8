"""Opens the one socket that all HTTP processes of an engine accept connections on. Runs in the launcher."""

from __future__ import annotations

import errno
import ipaddress
import socket
import ssl
from typing import Final

from ipc.errors import ConfigError
from pipeline.http.config import DEFAULT_PORT, HttpConfig

_BACKLOG: Final = 2_048


def open_listener(config: HttpConfig) -> socket.socket:
    """Listen on the configured address. Connections wait in the kernel's queue until an HTTP process accepts them.

    SO_REUSEPORT is not set, so a second engine cannot share the port unnoticed. Raises ConfigError for a port that is
    taken, an address that is not this machine's, or a certificate that cannot be used.
    """
    _check_certificate(config)
    port = DEFAULT_PORT if config.port is None else config.port
    family, address = _resolve(config.host, port)
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not a second listener: only after a restart
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(config.host != "::"))
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(_describe(error, config.host, port)) from None
    listener.setblocking(False)
    return listener


def url_of(config: HttpConfig, listener: socket.socket) -> str:
    """The URL by which a client on this machine reaches the server."""
    host, port = listener.getsockname()[:2]
    address = ipaddress.ip_address(host.partition("%")[0])
    if address.is_unspecified:
        host = "127.0.0.1" if address.version == 4 or config.host == "::" else "::1"
    return f"{'https' if config.tls_cert else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def read_keys(config: HttpConfig) -> list[str]:
    """The keys that requests may carry; none: every request is answered. Raises ConfigError."""
    if config.api_key_file is None:
        return []
    try:
        with open(config.api_key_file, encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file]
            keys = [line for line in lines if line and not line.startswith("#")]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"http.api_key_file ({config.api_key_file!r}) cannot be read: {error}") from None
    if not keys:
        raise ConfigError(f"http.api_key_file ({config.api_key_file!r}) has no key: write one key a line")
    return keys


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"http.host ({host!r}) is no address of this machine: {error}") from None
    family, _, _, _, address = found[0]
    return family, address  # type: ignore[return-value]


def _describe(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"http.port ({port}) is taken on {host}: another process listens there; set http.port to another port, or "
            "to 0 for a free one"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return f"http.host ({host!r}) is no address of this machine"
    if error.errno == errno.EACCES:
        return f"http.port ({port}) needs more rights than this user has: set http.port to 1024 or more"
    return f"http.port ({port}) on http.host ({host!r}): {error.strerror}"


def _check_certificate(config: HttpConfig) -> None:
    if config.tls_cert is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.tls_cert, config.tls_key, password=lambda: "")
    except (OSError, ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"http.tls_cert ({config.tls_cert!r}) and http.tls_key ({config.tls_key!r}) cannot be used: {error}"
        ) from None
