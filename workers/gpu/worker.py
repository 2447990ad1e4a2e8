"""The GPU process: takes step records, enqueues steps, and does nothing else that takes time.

Owns the choice of device and model, and the process's loop. Any error on the step path ends the process, because the
device's state after an error cannot be trusted.
"""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from msgspec import structs

from ipc.errors import ConfigError
from ipc.mask_records import mask_layout
from ipc.records import StepShape, prompt_layout, result_layout, step_layout
from ipc.trace import Span
from workers.gpu.config import COMPLETION, RECORDING, CacheConfig, GpuBootstrap, ModelConfig
from workers.gpu.device.base import Device
from workers.gpu.device.choose import make_device
from workers.gpu.device.timed import TimedDevice
from workers.gpu.execution.announced_runner import AnnouncedRunner
from workers.gpu.execution.buckets import Buckets
from workers.gpu.execution.executor import Executor
from workers.gpu.execution.model_runner import ModelRunner
from workers.gpu.execution.null_model import NullModel
from workers.gpu.execution.result_publisher import ResultPublisher
from workers.gpu.execution.rings import GpuRings
from workers.gpu.execution.steps import Submitted
from workers.gpu.memory.account import MemoryUse, bytes_taken, free_text
from workers.gpu.memory.former_process import wait_for_memory
from workers.gpu.memory.kv_cache import free_memory_bytes
from workers.gpu.memory.out_of_memory import is_out_of_memory, out_of_memory_text
from workers.gpu.profiling.step_loads import StepLoads
from workers.gpu.profiling.step_profiler import StepProfiler
from workers.gpu.recording.recording import Recording
from workers.gpu.recording.segment import segment_start
from workers.gpu.startup_stages import IMPORTING, Stages
from workers.process import StopWorker, WorkerProcess

logger = logging.getLogger(__name__)

Report = Callable[..., None]  # WorkerProcess.progress, or a function that calls it
CLOCK_KERNEL: Final = "_write_time"  # the kernel of the CUDA device's `read_clock`, which runs at both ends of a step
_LOOK_FOR_STOP_NS: Final = 50_000_000  # longest time of steps without a pause before the loop reads the control channel
_SETTLE_TIMEOUT_S: Final = 30.0  # for the device to finish the steps of dead processes


def run(process: WorkerProcess, bootstrap: GpuBootstrap) -> None:
    """Load the model, announce the number of KV blocks, and run steps until the launcher sends Stop."""
    with torch.inference_mode():
        stages = Stages(process.progress, process.begun_at_ns)
        memory = MemoryUse()
        try:
            loaded = load(
                stages.progress, bootstrap.model, bootstrap.cache, bootstrap.shape,
                num_blocks=bootstrap.num_blocks, device_bytes=bootstrap.device_bytes,
            )  # fmt: skip
            memory = loaded.memory
            if loaded.device.torch_device.type == "cpu":
                loaded = replace(loaded, runner=AnnouncedRunner(loaded.runner, process.busy))
            executor = make_executor(stages.progress, bootstrap, loaded)
            if loaded.buckets is not None:
                memory = replace(memory, graphs=capture_graphs(stages.progress, loaded.device, executor))
            stages.serve()
            stages.count(process.stats)
            logger.info(
                "loaded in %.1f s: %s; memory: %s (%d); %s", stages.total_s, stages.durations(), memory,
                loaded.num_blocks, free_text(loaded.device.torch_device),
            )  # fmt: skip
            completion = ResultPublisher(
                loaded.device, executor, bootstrap.worker.ring("result").wake, wake=process.doorbell.ring,
                trace=process.trace, thread_trace=process.tracer_of(COMPLETION),
            )  # fmt: skip
            path = bootstrap.model.profile_path
            loads = StepLoads(bootstrap.shape.max_num_seqs)
            profiler = (
                StepProfiler(Path(path), loaded.device.torch_device, marker=CLOCK_KERNEL, loads=loads) if path else None
            )
            recording = begin_recording(bootstrap, loaded)
            if recording is not None:
                executor.tap = recording.take
            process.on_rewire(Rewiring(bootstrap, executor, completion, recording))
            process.stalled_s = lambda: executor.stalled_s(time.monotonic_ns())
            process.ready(num_blocks=loaded.num_blocks, device_bytes=device_bytes(loaded))
            with closing_recording(recording):
                run_steps(process, executor, completion, profiler)
        except Exception as error:
            if is_out_of_memory(error):
                raise ConfigError(out_of_memory_text(error, stages, bootstrap, memory)) from error
            raise


def prepare() -> None:
    """Import all that a GPU process may need. Looks at no device: a spare process must take no memory of it."""
    import workers.gpu.model.loader

    if importlib.util.find_spec("triton") is not None:
        import workers.gpu.device.cuda  # noqa: F401


class Rewiring:
    """Connects the executor to processes that the launcher has started again."""

    def __init__(
        self,
        bootstrap: GpuBootstrap,
        executor: Executor,
        completion: ResultPublisher,
        recording: Recording | None = None,
    ) -> None:
        self._worker = bootstrap.worker
        self._executor = executor
        self._completion = completion
        self._recording = recording

    def __call__(self, bootstrap: GpuBootstrap) -> None:
        """Take over the new rings of a new scheduler. A new grammar process continues its ring: nothing changes then.

        A new scheduler has new tokenizers and new grammar processes, so all rings are new. Raises TimeoutError if the
        device does not finish the steps of the dead scheduler: this process must end then.
        """
        old, self._worker = self._worker, bootstrap.worker
        if self._worker.ring("step").handle.epoch != old.ring("step").handle.epoch:
            self._completion.settle(_SETTLE_TIMEOUT_S)
            self._executor.replace_rings(attach_rings(bootstrap))
            if self._recording is not None:
                self._recording.rings_replaced(self._worker.ring("step").handle.epoch)
            self._completion.ring_scheduler = self._worker.ring("result").wake
            logger.info("takes steps from a new scheduler")


def begin_recording(bootstrap: GpuBootstrap, loaded: Loaded) -> Recording | None:
    """The recording of this process's steps; None without `--record`, and in processes that publish no results."""
    fd = bootstrap.worker.kept.get(RECORDING)
    if fd is None or bootstrap.worker.index > 0:
        return None
    start = segment_start(bootstrap, loaded.num_blocks, loaded.device.torch_device)
    return Recording(fd, bootstrap.record_limit_bytes, start)


@contextmanager
def closing_recording(recording: Recording | None) -> Iterator[None]:
    """End the recording with this process, however its work ends."""
    reason = "failed"
    try:
        yield
    except StopWorker:
        reason = "stopped"
        raise
    finally:
        if recording is not None:
            recording.close(reason)


def make_executor(progress: Report, bootstrap: GpuBootstrap, loaded: Loaded) -> Executor:
    progress("allocating tables", 0.0)
    return Executor(
        loaded.device, loaded.runner, bootstrap.shape, bootstrap.depth, loaded.num_blocks, attach_rings(bootstrap),
        buckets=loaded.buckets, mask_timeout_s=bootstrap.mask_timeout_s,
    )  # fmt: skip


def capture_graphs(progress: Report, device: Device[Any, Any], executor: Executor) -> int:
    """Capture a graph for each bucket. Returns the bytes that the graphs take."""

    def report(share: float) -> None:
        progress("capturing graphs", share)

    report(0.0)
    return bytes_taken(device.torch_device, lambda: executor.warm_up(report))


def run_steps(
    process: WorkerProcess, executor: Executor, completion: ResultPublisher, profiler: StepProfiler | None = None
) -> None:
    """Submit steps as their records arrive. Ends only by an error or, after the launcher's Stop, by StopWorker."""
    stats, trace = process.stats, process.trace
    looked_at_ns = 0
    while True:
        completion.check()
        now_ns = time.monotonic_ns()
        held = executor.held_back
        step = executor.submit_next(now_ns)
        launched = step or executor.held_back  # as a whole, or its first half
        if launched is None or (step is None and launched is held):
            process.wait(_ms_until(executor.mask_deadline_ns))
            continue
        trace.record(Span.LAUNCH, now_ns, time.monotonic_ns() - now_ns, launched.ticket, *launched.bucket)
        if launched.owed:
            trace.gauge(Span.MISSING_MASKS, 0 if step else sum(part.num_masks for part in launched.owed))
        if step is not None:
            if profiler is not None:
                profiler.note(step.record)
            completion.submitted(step)
            _count(stats, step)
            if profiler is not None:
                profiler.step()
        stats.launch_ns[0] += time.monotonic_ns() - now_ns
        if now_ns - looked_at_ns > _LOOK_FOR_STOP_NS:
            process.wait(timeout_ms=0)
            looked_at_ns = now_ns


def _count(stats: Any, step: Submitted) -> None:
    stats.num_steps[0] += 1
    stats.num_rows[0] = step.num_seqs
    if step.owed:
        stats.num_late_masks[0] += step.num_closed_masks
        stats.mask_wait_ns[0] += step.mask_wait_ns


def _ms_until(deadline_ns: int | None) -> int | None:
    """Whole milliseconds until then, rounded up; None = for ever."""
    return None if deadline_ns is None else max(0, -((time.monotonic_ns() - deadline_ns) // 1_000_000))


@dataclass(frozen=True)
class Loaded:
    """A device with a loaded model. `buckets`: see Executor. `free_bytes`: of a GPU's memory, before the model."""

    device: Device[Any, Any]
    runner: ModelRunner
    num_blocks: int  # KV blocks for the scheduler to allocate
    memory: MemoryUse
    buckets: Buckets | None = None
    free_bytes: int = 0


def device_bytes(loaded: Loaded) -> int:
    """The bytes of a GPU's memory that the process has taken since its start; 0 on the CPU."""
    device = loaded.device.torch_device
    return max(0, loaded.free_bytes - free_memory_bytes(device)) if device.type == "cuda" else 0


def load(
    progress: Report,
    model: ModelConfig,
    cache: CacheConfig,
    shape: StepShape,
    *,
    num_blocks: int | None = None,
    device_bytes: int = 0,
) -> Loaded:
    """Load a model. Raises ConfigError or ModelUnsupported if it cannot run here.

    Of an earlier process in whose place this one is: `num_blocks`, its KV blocks, and `device_bytes`, which it took of
    the device and which may not be free again yet.
    """
    if num_blocks is not None:
        cache = structs.replace(cache, num_blocks=num_blocks)
    if model.load_format == "null":
        torch.set_num_threads(1)
        timed = TimedDevice()
        step_ns = round(model.null_step_ms * 1e6)
        spend = partial(timed.spend, step_ns)
        runner = NullModel(shape, timed.torch_device, spend, model.null_vocab_size)
        return Loaded(timed, runner, cache.num_blocks or default_num_blocks(shape), MemoryUse())

    progress(IMPORTING, 0.0)  # takes seconds, and the null model does not need it
    from workers.gpu.model.loader import load_model

    progress("starting the device", 0.0)

    device = make_device(model.device)
    free_bytes = 0
    if device.torch_device.type == "cuda":
        wait_for_memory(device_bytes, lambda: free_memory_bytes(device.torch_device), progress)
        free_bytes = free_memory_bytes(device.torch_device)
    loaded = load_model(model, cache, shape, device.torch_device, progress)
    buckets = Buckets(shape, captures=loaded.can_be_captured) if device.torch_device.type == "cuda" else None
    return Loaded(device, loaded.runner, loaded.num_blocks, loaded.memory, buckets, free_bytes)


def default_num_blocks(shape: StepShape) -> int:
    """Return the number of KV blocks that suffices for every row at full length."""
    return shape.max_num_seqs * shape.max_blocks_per_seq


def attach_rings(bootstrap: GpuBootstrap) -> GpuRings:
    """Map the rings. Raises LayoutMismatch if a ring's layout differs from the launcher's."""
    worker = bootstrap.worker
    return GpuRings(
        step=worker.ring("step").attach(step_layout(bootstrap.shape)),
        result=worker.ring("result").attach(result_layout(bootstrap.shape)),
        prompts=[end.attach(prompt_layout()) for end in worker.rings["prompt"]],
        masks=[end.attach(mask_layout(bootstrap.shape)) for end in worker.rings.get("mask", [])],
    )
