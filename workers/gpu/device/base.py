"""What the executor asks of a device: ordered queues of work, events between them, and asynchronous copies.

Owns the protocol only. `cpu.py` runs work at once, `timed.py` as well but lets it take made-up time, `simulated.py`
runs it late and checks that events order every access. The shape is CUDA's: calls enqueue and return, and nothing but
`synchronize` and `settle` blocks the host.
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
    """Streams `S` run their work in the order in which it was enqueued; between streams only events `E` order it.

    As in CUDA, waiting for an event means its latest `record` before that wait, and an event that was never recorded is
    complete.
    """

    @property
    def torch_device(self) -> torch.device: ...

    @property
    def clock(self) -> Clock:
        """What makes CLOCK_MONOTONIC of the times that `read_clock` writes."""
        ...

    def stream(self, name: str) -> S: ...

    def event(self, name: str) -> E: ...

    def zeros(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor that lives as long as the device: graphs and copies keep its address."""
        ...

    def register_host(self, name: str, buffer: memoryview) -> torch.Tensor:
        """The buffer's bytes as a tensor [num_bytes] uint8, page-locked where the device copies by DMA.

        `buffer` begins and ends on page borders and stays mapped as long as the device lives.
        """
        ...

    def copy(self, stream: S, target: torch.Tensor, source: torch.Tensor) -> None:
        """Enqueue a copy between contiguous tensors of one dtype and shape, on the device or in registered memory."""
        ...

    def launch(self, stream: S, work: Callable[[], None], accesses: Callable[[], Accesses]) -> None:
        """Enqueue what `work` enqueues. `accesses` tells which registered memory it reads and writes: contiguous
        tensors, written ones need not be named as read. A device that does not check never calls it."""
        ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Something for `launch` that does what `work` does, from a graph where the device has them.

        `work` reads and writes fixed addresses only and looks at no value on the host. Memory that it allocates is
        good until other captured work runs. Its first launch may take long.
        """
        ...

    def read_clock(self, stream: S, target: torch.Tensor) -> None:
        """Enqueue writing the time at which the stream gets there, in ns of the device's `clock`, to `target` [1]
        int64."""
        ...

    def record(self, event: E, stream: S) -> None:
        """The event fires when everything enqueued on the stream so far is done."""
        ...

    def wait(self, stream: S, event: E) -> None:
        """Whatever is enqueued on the stream from now on runs after the event. Does not block the host."""
        ...

    def query(self, event: E) -> bool: ...

    def synchronize(self, event: E) -> None:
        """Block this thread, without the interpreter lock, until the event has fired."""
        ...

    def settle(self) -> None:
        """Block until everything enqueued so far, on whatever stream, is done: the end of setting up."""
        ...
