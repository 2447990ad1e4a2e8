"""A CUDA GPU as a device: streams, events and copies are torch's, and captured work becomes CUDA graphs.

Only `synchronize`, `settle` and the first launch of captured work block the host. Only events, and the order
of kernels on a stream, order memory accesses: tensors keep their addresses for as long as the device lives.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from workers.gpu.device.base import Accesses
from workers.gpu.device.clock import DriftingClock

logger = logging.getLogger(__name__)

_CLOCK_READINGS: Final = 50  # readings of both clocks; the pair read closest together counts
# By address. Kept mapped until they are unregistered, because the driver would go on copying to these addresses.
_page_locked: Final[dict[int, torch.Tensor]] = {}


class CudaDevice:
    """See Device. One per process, on torch's current CUDA device."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self._graph_memory = _GraphMemory(torch.cuda.graph_pool_handle())
        self.clock = self._read_both_clocks()

    def stream(self, name: str) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]

    def event(self, name: str) -> torch.cuda.Event:
        """Return a `blocking` event: a thread that waits for it sleeps instead of spinning."""
        return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def zeros(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.torch_device)

    def register_host(self, name: str, buffer: memoryview) -> torch.Tensor:
        """See Device. Memory that cannot be page-locked works too: the driver stages its copies, and the host waits for
        them."""
        memory = torch.frombuffer(buffer, dtype=torch.uint8)
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        status = runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
        if int(status):
            logger.warning(
                "%s: %d bytes cannot be page-locked (%s): steps will wait for its copies; see ulimit -l",
                name, memory.numel(), runtime.cudaGetErrorString(status),
            )  # fmt: skip
            # Clears the error, which the runtime would otherwise report again at the next launch.
            with contextlib.suppress(RuntimeError):
                torch.ones(1, device=self.torch_device)
        else:
            _page_locked[memory.data_ptr()] = memory
        return memory

    def unregister_host(self, buffer: memoryview) -> None:
        """See Device. Raises RuntimeError if the driver refuses."""
        memory = _page_locked.pop(torch.frombuffer(buffer, dtype=torch.uint8).data_ptr(), None)
        if memory is not None:
            runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            torch.cuda.check_error(runtime.cudaHostUnregister(memory.data_ptr()))

    def copy(self, stream: torch.cuda.Stream, target: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)

    def launch(self, stream: torch.cuda.Stream, work: Callable[[], None], accesses: Callable[[], Accesses]) -> None:
        with torch.cuda.stream(stream):
            work()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """See Device. The first launch runs the work directly, which compiles its kernels, and then captures it without
        running it again. It blocks the host, so make it during start-up."""
        return _Graph(work, self._graph_memory)

    def read_clock(self, stream: torch.cuda.Stream, target: torch.Tensor) -> None:
        with torch.cuda.stream(stream):
            _write_time[(1,)](target, num_warps=1)

    def record(self, event: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
        event.record(stream)

    def wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        stream.wait_event(event)

    def query(self, event: torch.cuda.Event) -> bool:
        return bool(event.query())  # type: ignore[no-untyped-call]

    def synchronize(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def settle(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def _read_both_clocks(self) -> DriftingClock:
        """Read both clocks now. The times of later steps show the drift."""
        now = torch.zeros(1, dtype=torch.int64, device=self.torch_device)
        _write_time[(1,)](now, num_warps=1)  # compiles it
        readings = []
        for _ in range(_CLOCK_READINGS):
            self.settle()
            before_ns = time.monotonic_ns()
            _write_time[(1,)](now, num_warps=1)
            self.settle()
            after_ns = time.monotonic_ns()
            readings.append((after_ns - before_ns, int(now.item()), (before_ns + after_ns) // 2))
        _, device_ns, host_ns = min(readings)
        return DriftingClock(device_ns, host_ns)


@dataclass
class _GraphMemory:
    """The memory pool of all graphs of a device, which they share because they run one after the other."""

    pool: Any
    first: torch.cuda.CUDAGraph | None = None  # kept alive, because torch discards a pool that has no graph left


class _Graph:
    """Work that is replayed from its second call on. The caller makes the stream current that the work runs on."""

    def __init__(self, work: Callable[[], None], memory: _GraphMemory) -> None:
        self._work = work
        self._memory = memory
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.replay()
            return
        self._work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # "thread_local", so that other threads may wait for events during the capture.
        graph.capture_begin(pool=self._memory.pool, capture_error_mode="thread_local")
        try:
            self._work()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the cause, raised below, says more than this error
                graph.capture_end()
            raise
        graph.capture_end()
        self._memory.first = self._memory.first or graph
        self._graph = graph


@triton.jit
def _write_time(target: tl.tensor) -> None:
    tl.store(target, globaltimer())
