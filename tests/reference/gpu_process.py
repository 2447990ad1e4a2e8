"""The surroundings of a GPU process, so that a test can run its whole life in its own: `run(process, bootstrap)`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from ipc.doorbell import Doorbell
from ipc.mask_records import mask_layout
from ipc.record_layout import Layout, R
from ipc.records import ResultRecord, StepRecord, StepShape, prompt_layout, result_layout, step_layout
from ipc.ring import Ring, close_handle
from ipc.stats_page import StatsPage
from ipc.tracer import Tracer, tracer
from workers.bootstrap import RingEnd, WorkerBootstrap
from workers.gpu.config import COUNTERS, CacheConfig, GpuBootstrap, ModelConfig
from workers.process import StopWorker


class FakeProcess:
    """The parts of a WorkerProcess that the role uses. Told to stop as soon as it waits."""

    def __init__(self, bootstrap: WorkerBootstrap) -> None:
        self.stats = StatsPage(bootstrap.stats).values
        self.doorbell = Doorbell(bootstrap.doorbell_fd)
        self.trace = tracer(None)
        self.is_ready = False
        self.begun_at_ns = time.monotonic_ns()
        self.stalled_s: Callable[[], float] = lambda: 0.0

    def tracer_of(self, thread: str) -> Tracer:
        return tracer(None)

    def progress(self, stage: str, fraction: float, total_bytes: int = 0) -> None:
        pass

    def on_control(self, take: Callable[[Any], None]) -> None:
        """No message of the launcher arrives."""

    def on_rewire(self, take: Callable[[Any], None]) -> None:
        """No new bootstrap arrives."""

    def busy(self, seconds: float) -> None:
        pass

    def ready(self, **info: int) -> None:
        self.is_ready = True

    def wait(self, timeout_ms: int | None = None) -> None:
        raise StopWorker


@dataclass(frozen=True)
class GpuProcess:
    """The arguments of `run`, and the scheduler's ends of the step ring and the result ring."""

    process: Any
    bootstrap: GpuBootstrap
    steps: Ring[StepRecord]
    results: Ring[ResultRecord]


@contextmanager
def gpu_process(
    model: ModelConfig,
    shape: StepShape,
    cache: CacheConfig | None = None,
    *,
    epoch: int = 1,
    num_blocks: int | None = None,
) -> Iterator[GpuProcess]:
    """At depth 2, with one prompt ring, the scheduler's, and a mask ring for each grammar worker of the shape.

    `epoch`: of the rings. `num_blocks`: of the first start.
    """
    with ExitStack() as stack:

        def ring(name: str, layout: Layout[R]) -> Ring[R]:
            made = Ring.create(name, layout, 4, epoch)
            stack.callback(close_handle, made.handle)
            return made

        def bell() -> int:
            fd = Doorbell.create().fd
            stack.callback(os.close, fd)
            return fd

        steps, results = ring("step", step_layout(shape)), ring("result", result_layout(shape))
        stats = StatsPage.create("gpu", COUNTERS)
        stack.callback(os.close, stats.fd)
        worker = WorkerBootstrap(
            role="gpu",
            doorbell_fd=bell(),
            stats=stats,
            launcher_pid=os.getpid(),
            rings={
                "step": [RingEnd(handle=steps.handle)],
                "result": [RingEnd(handle=results.handle, writes=True, doorbells=[bell()])],
                "prompt": [RingEnd(handle=ring("prompt", prompt_layout()).handle)],
                "mask": [
                    RingEnd(handle=ring(f"mask.{i}", mask_layout(shape)).handle)
                    for i in range(shape.num_grammar_workers)
                ],
            },
        )
        bootstrap = GpuBootstrap(
            worker=worker,
            model=model,
            cache=cache or CacheConfig(block_size=shape.block_size),
            shape=shape,
            depth=2,
            num_blocks=num_blocks,
        )
        yield GpuProcess(FakeProcess(worker), bootstrap, steps, results)
