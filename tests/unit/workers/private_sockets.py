"""The engine's internal sockets for tests that play some of its processes themselves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import zmq

from ipc.channels import bind_private_router, connect_dealer
from ipc.private_socket import endpoint_through, open_private_socket

SOCKETS = ("control", "tokenize", "schedule", "detokenize", "deliver")


class PrivateSockets:
    """A socket of each name. `listeners` and `sockets` are what a WorkerBootstrap has."""

    def __init__(self, folder: Path) -> None:
        opened = {name: open_private_socket(folder) for name in SOCKETS}
        self.listeners = {name: listener for name, (listener, _) in opened.items()}
        self.sockets = {name: connector for name, (_, connector) in opened.items()}

    def bind(self, context: zmq.Context[Any], name: str) -> zmq.Socket[Any]:
        return bind_private_router(context, self.listeners[name])

    def connect(self, context: zmq.Context[Any], name: str, identity: bytes | None = None) -> zmq.Socket[Any]:
        return connect_dealer(context, endpoint_through(self.sockets[name]), identity=identity)

    def close(self) -> None:
        for descriptor in (*self.listeners.values(), *self.sockets.values()):
            os.close(descriptor)
