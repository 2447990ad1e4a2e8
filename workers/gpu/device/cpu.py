"""The CPU as a device: work runs when it is enqueued, on the calling thread, so it is always in order."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from workers.gpu.device.base import Accesses
from workers.gpu.device.clock import HostClock


class CpuDevice:
    """See Device. Streams and events are only names here."""

    torch_device = torch.device("cpu")
    clock = HostClock()

    def stream(self, name: str) -> str:
        return name

    def event(self, name: str) -> str:
        return name

    def zeros(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def register_host(self, name: str, buffer: memoryview) -> torch.Tensor:
        return torch.frombuffer(buffer, dtype=torch.uint8)

    def unregister_host(self, buffer: memoryview) -> None:
        pass

    def copy(self, stream: Any, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def launch(self, stream: Any, work: Callable[[], None], accesses: Callable[[], Accesses]) -> None:
        work()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        return work

    def read_clock(self, stream: Any, target: torch.Tensor) -> None:
        target.fill_(time.monotonic_ns())

    def record(self, event: Any, stream: Any) -> None:
        pass

    def wait(self, stream: Any, event: Any) -> None:
        pass

    def query(self, event: Any) -> bool:
        return True

    def synchronize(self, event: Any) -> None:
        pass

    def settle(self) -> None:
        pass
