"""The protocol between executor and device: ordered queues of work, events between them, and asynchronous copies.

Owns the protocol only. `cuda.py` implements it on a GPU. `cpu.py` runs work at once. `timed.py` does the same, but work
takes made-up time. The tests' `simulated_device.py` runs work late and checks that events order every access. The
protocol follows CUDA: calls enqueue and return, and only `synchronize` and `settle` block the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch

from workers.gpu.device.clock import Clock

Accesses = tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]  # (read, written)

S = TypeVar("S")
E = TypeVar("E")


class Device(Protocol[S, E]):
    """A stream `S` runs its work in the order in which it was enqueued. Only events `E` order the work of different
    streams.

    As in CUDA, waiting for an event means its latest `record` before that wait, and an event that was never recorded is
    complete.
    """

    @property
    def torch_device(self) -> torch.device: ...

    @property
    def clock(self) -> Clock:
        """Converts the times that `read_clock` writes to CLOCK_MONOTONIC."""
        ...

    def stream(self, name: str) -> S: ...

    def event(self, name: str) -> E: ...

    def zeros(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor that lives as long as the device, because graphs and copies use its address."""
        ...

    def register_host(self, name: str, buffer: memoryview) -> torch.Tensor:
        """The buffer's bytes as a tensor [num_bytes] uint8, page-locked where the device copies by DMA.

        `buffer` begins and ends on page borders and stays mapped until `unregister_host`, or as long as the device
        lives.
        """
        ...

    def unregister_host(self, buffer: memoryview) -> None:
        """Undo `register_host`, so that the buffer may be unmapped. No copy of its bytes may be left to do."""
        ...

    def copy(self, stream: S, target: torch.Tensor, source: torch.Tensor) -> None:
        """Enqueue a copy between contiguous tensors of one dtype and shape, on the device or in registered memory."""
        ...

    def launch(self, stream: S, work: Callable[[], None], accesses: Callable[[], Accesses]) -> None:
        """Enqueue the work that `work` enqueues.

        `accesses` returns the registered memory that the work reads and writes, as contiguous tensors. A written tensor
        counts as read too. A device calls `accesses` only if it checks them.
        """
        ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return a callable for `launch` that does the same as `work`, by a graph if the device has graphs.

        `work` may read and write only fixed addresses, and may not read values on the host. Memory that it allocates is
        valid until other captured work runs. The first launch may take long.
        """
        ...

    def read_clock(self, stream: S, target: torch.Tensor) -> None:
        """Enqueue a write of the stream's current time, in ns of the device's `clock`, to `target` [1] int64."""
        ...

    def record(self, event: E, stream: S) -> None:
        """The event fires when everything enqueued on the stream so far is done."""
        ...

    def wait(self, stream: S, event: E) -> None:
        """Work that is enqueued on the stream after this call runs after the event. Does not block the host."""
        ...

    def query(self, event: E) -> bool: ...

    def synchronize(self, event: E) -> None:
        """Block this thread until the event has fired. Releases the interpreter lock meanwhile."""
        ...

    def settle(self) -> None:
        """Block until all work enqueued so far, on any stream, is done. Used at the end of start-up."""
        ...
