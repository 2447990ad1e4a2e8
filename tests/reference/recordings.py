"""Recordings without an engine: a toy model's steps, and the changes that a test plants in a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from ipc.codec import encode
from ipc.records import StepShape, result_layout, step_layout
from pipeline.recording.replay import Replay, replay
from tests.simulation.harness import ToyModel
from workers.gpu.config import CacheConfig, ModelConfig
from workers.gpu.device.cpu import CpuDevice
from workers.gpu.execution.executor import Executor
from workers.gpu.memory.account import MemoryUse
from workers.gpu.recording.frames import FILE_START, Frame, RecordedStep, RecordingFile, SegmentStart, pack_chunk
from workers.gpu.recording.packing import StepPacking
from workers.gpu.recording.recording import Recording
from workers.gpu.recording.segment import layout_hashes, versions
from workers.gpu.worker import Loaded

LIMIT = 1 << 30


def toy_segment(shape: StepShape, num_blocks: int, **changes: Any) -> SegmentStart:
    start = SegmentStart(
        model=ModelConfig(path="toy", load_format="null"),
        cache=CacheConfig(block_size=shape.block_size),
        shape=shape,
        depth=2,
        num_blocks=num_blocks,
        layouts=layout_hashes(shape),
        config_sha256="",
        weights_sha256="",
        device="cpu",
        num_threads=1,
        versions=versions(),
        epoch=1,
        started_s=time.time(),
    )
    return replace(start, **changes)


@contextmanager
def recorded(executor: Executor, fd: int, start: SegmentStart, limit_bytes: int = LIMIT) -> Iterator[Recording]:
    """Record what this executor does, as one segment."""
    recording = Recording(fd, limit_bytes, start)
    executor.tap = recording.take
    yield recording
    recording.close("stopped")


def replay_toy(path: Path, patch: pytest.MonkeyPatch, model: type[ToyModel] = ToyModel) -> Replay:
    """Replay with a toy model in place of the one that the file names."""

    def load(progress: Any, _: ModelConfig, cache: CacheConfig, shape: StepShape, *, num_blocks: int) -> Loaded:
        return Loaded(CpuDevice(), model(shape, num_blocks), num_blocks, MemoryUse())

    patch.setattr("workers.gpu.recording.recorded_model.load", load)
    return replay(str(path), say=lambda _: None)


def frames_of(path: Path) -> list[Frame]:
    with closing(RecordingFile(path)) as file:
        return list(file.frames())


def write_frames(path: Path, frames: list[Frame]) -> None:
    """A file with a chunk for each frame."""
    path.write_bytes(FILE_START + b"".join(pack_chunk([encode(frame)]) for frame in frames))


def change_step(path: Path, number: int, change: Callable[[RecordedStep], RecordedStep]) -> None:
    """Change the step of this number, counting from 1."""
    frames = frames_of(path)
    steps = [i for i, frame in enumerate(frames) if isinstance(frame, RecordedStep)]
    step = frames[steps[number - 1]]
    assert isinstance(step, RecordedStep)
    frames[steps[number - 1]] = change(step)
    write_frames(path, frames)


def with_other_token(step: RecordedStep, shape: StepShape) -> RecordedStep:
    """The step with another result for the first of its sequences that got a token."""
    packing = StepPacking(shape)
    memory, result_memory = (memoryview(bytearray(f(shape).num_bytes)) for f in (step_layout, result_layout))
    record, result = step_layout(shape).views(memory), result_layout(shape).views(result_memory)
    packing.unpack_step(step.step, record, memory)
    packing.unpack_result(step.result, record, result_memory)
    (sampled,) = np.nonzero(record.seq_sample[: int(record.num_seqs[0])])
    result.token_ids[sampled[0]] ^= 1
    return replace(step, result=packing.pack(record, memory, result_memory)[1])


def with_field(step: RecordedStep, shape: StepShape, field: str, value: int) -> RecordedStep:
    """The step with another value in the first entry of a field of its record. Everything else stays."""
    packing, layout = StepPacking(shape), step_layout(shape)
    memory = memoryview(bytearray(layout.num_bytes))
    record = layout.views(memory)
    packing.unpack_step(step.step, record, memory)
    entry = layout.fields[field].of(record)
    assert entry[0] != value
    if field.startswith("num_"):  # in front of the packed record, as in memory
        packed = bytearray(step.step)
        np.frombuffer(packed, np.int32, 1, layout.fields[field].offset)[0] = value
        return replace(step, step=bytes(packed))
    entry[0] = value
    result = memoryview(bytearray(result_layout(shape).num_bytes))
    return replace(step, step=packing.pack(record, memory, result)[0])
