"""What a GPU process writes: whole chunks, up to a limit, and nothing that can stop the engine."""

from __future__ import annotations

import errno
import logging
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from ipc.errors import ConfigError
from ipc.record_layout import Layout
from ipc.records import SamplerVariant, StepShape, result_layout, step_layout
from pipeline.recording.file import recording_file
from tests.reference.gpu_process import gpu_process
from tests.reference.recordings import frames_of, recorded, toy_segment
from tests.unit.workers.gpu.execution.test_executor import Ends, publish_step
from tests.unit.workers.gpu.execution.test_replaced_rings import executor_on
from workers.gpu import worker
from workers.gpu.config import RECORDING, ModelConfig
from workers.gpu.device.cpu import CpuDevice
from workers.gpu.recording import recording as module
from workers.gpu.recording.frames import FILE_START, Frame, RecordedStep, RecordingFile, SegmentEnd, SegmentStart
from workers.gpu.recording.packing import StepPacking
from workers.process import StopWorker

SHAPE = StepShape(max_num_seqs=3, max_num_batched_tokens=16, max_model_len=32, block_size=4)
NUM_BLOCKS = 16
START = toy_segment(SHAPE, NUM_BLOCKS)


def record_steps(fd: int, num_steps: int, limit_bytes: int = 1 << 30) -> None:
    """One segment. The engine runs all steps, whatever becomes of the recording."""
    ends = Ends(SHAPE, 2)
    executor = executor_on(CpuDevice(), ends)
    with torch.inference_mode(), recorded(executor, fd, START, limit_bytes):
        for _ in range(num_steps):
            publish_step(ends.steps)
            assert executor.submit_next(0) is not None
            executor.publish()
            assert ends.results.take() is not None
            ends.results.release_through(ends.results.next_ticket - 1)


def kinds(path: Path) -> list[str]:
    return [type(frame).__name__ for frame in frames_of(path)]


def test_a_file_is_for_its_user_alone_and_a_second_engine_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r"
    with recording_file(path):
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(ConfigError, match=f"--record {path}: another engine writes to it"), recording_file(path):
            pass
    with pytest.raises(ConfigError, match="--record /dev/null: is no regular file"), recording_file("/dev/null"):
        pass
    with pytest.raises(ConfigError, match="cannot be written: No such file"), recording_file(tmp_path / "none" / "r"):
        pass


def test_a_part_of_a_chunk_that_a_killed_process_has_left_is_removed_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "r"
    with recording_file(path) as fd:
        record_steps(fd, 3)
        whole = path.read_bytes()
        os.write(fd, whole[len(FILE_START) : -7])
        record_steps(fd, 2)
    segment = ["SegmentStart", *["RecordedStep"] * 3, "SegmentEnd"]
    assert kinds(path) == [*segment, *segment[:3], "SegmentEnd"]


def test_a_recording_ends_before_its_limit_and_later_processes_leave_it_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1)
    path, limit = tmp_path / "r", 1 << 13
    with recording_file(path) as fd, caplog.at_level(logging.WARNING):
        record_steps(fd, 60, limit)
        size = path.stat().st_size
        assert 0.4 * limit < size <= limit
        assert len(caplog.messages) == 1, "one line says that it ends"
        record_steps(fd, 5)
        assert path.stat().st_size == size
    end = frames_of(path)[-1]
    assert isinstance(end, SegmentEnd)
    assert end.reason == "full"
    assert caplog.messages == [
        "the recording ends here: it has reached its limit (0 MiB)",
        "the recording is full: this process is not recorded",
    ]


def test_a_full_disk_ends_the_recording_with_one_line_and_leaves_whole_chunks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1)
    real, left = os.write, [2_000]

    def write(fd: int, data: Any) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = bytes(data)[: left[0]]
        left[0] -= len(part)
        return real(fd, part)

    path = tmp_path / "r"
    with recording_file(path) as fd:
        monkeypatch.setattr(module.os, "write", write)
        record_steps(fd, 60)
        assert left == [0]
    assert caplog.messages == ["the recording cannot be written any more (No space left on device): it ends here"]
    found = kinds(path)
    assert found[:2] == ["SegmentStart", "RecordedStep"]
    assert len(found) < 60
    with closing(RecordingFile(path)) as file:
        assert len(list(file.frames())) == len(found)
        assert not file.is_cut


def test_a_disk_that_is_too_slow_ends_the_recording(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_QUEUED_BYTES", 2_000)
    with recording_file(tmp_path / "r") as fd:
        record_steps(fd, 100)
    assert caplog.messages == [
        "the recording ends here: 0 MiB of steps wait to be written; the disk is too slow",
    ]


@pytest.mark.parametrize("change", ["cut", "damaged"])
def test_what_stands_in_front_of_a_cut_or_a_damage_is_read(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1)
    path = tmp_path / "r"
    with recording_file(path) as fd:
        record_steps(fd, 3)
    content, whole, numbers = path.read_bytes(), frames_of(path), set()
    for at in range(len(FILE_START), len(content), 17):
        damaged = bytearray(content)
        damaged[at] ^= 1
        path.write_bytes(content[:at] if change == "cut" else damaged)
        found: list[Frame] = []
        error = ""
        with closing(RecordingFile(path)) as file:
            try:
                found.extend(file.frames())  # keeps what came before an error
            except ConfigError as raised:
                error = str(raised)
            if change == "damaged":
                assert file.is_cut or error.startswith(f"{path}: is damaged at byte ")
            else:
                assert error == ""
        assert found == whole[: len(found)]
        numbers.add(len(found))
    assert numbers == {0, 1, 2, 3, 4}


def filled(layout: Layout[Any], seed: int) -> memoryview:
    return memoryview(bytearray(np.random.default_rng(seed).bytes(layout.num_bytes)))


@pytest.mark.parametrize("variant", list(SamplerVariant))
@pytest.mark.parametrize("wants", [0, 3])
def test_every_entry_that_means_anything_is_packed(variant: SamplerVariant, wants: int) -> None:
    """A field of a new kind of size must be given a count, or is packed whole."""
    steps, results = step_layout(SHAPE), result_layout(SHAPE)
    memory, result = filled(steps, 1), filled(results, 2)
    record = steps.views(memory)
    counts = {"num_seqs": 2, "num_appends": 5, "num_admissions": 1, "num_prompt_logprobs": 4}
    for name, count in counts.items():
        getattr(record, name)[0] = count
    record.variant[0], record.want_logprobs[0] = variant, wants
    packing = StepPacking(SHAPE)
    packed, packed_result = packing.pack(record, memory, result)
    other, other_result = memoryview(bytearray(steps.num_bytes)), memoryview(bytearray(results.num_bytes))
    packing.unpack_step(packed, steps.views(other), other)
    packing.unpack_result(packed_result, record, other_result)
    for layout, before, after in ((steps, memory, other), (results, result, other_result)):
        old, new = layout.views(before), layout.views(after)
        for field in layout.fields.values():
            most = {3: 2, 15: 5, 16: 4}.get(field.shape[0], field.shape[0])
            if field.name.startswith("admit_"):
                most = 1
            if field.name in ("logprob", "top_ids", "top_logprobs", "extra_logprobs"):
                most *= wants > 0 and (field.name != "extra_logprobs" or variant == SamplerVariant.ADJUSTED)
            assert field.of(new)[:most].tobytes() == field.of(old)[:most].tobytes(), field.name
            assert not field.of(new)[most:].tobytes().strip(b"\0"), f"{field.name}: more than means anything"
    with pytest.raises(ConfigError, match=f"a record has {len(packed) + 1} bytes, and {len(packed)} are needed"):
        packing.unpack_step(packed + b"x", record, memory)


def test_a_gpu_process_records_itself_from_its_first_step_to_its_stop(tmp_path: Path) -> None:
    path = tmp_path / "r"
    model = ModelConfig(path="unused", load_format="null")
    with recording_file(path) as fd, gpu_process(model, SHAPE, num_blocks=NUM_BLOCKS) as gpu:
        kept = replace(gpu.bootstrap.worker, kept={RECORDING: fd}, epoch=3)
        publish_step(gpu.steps)
        with pytest.raises(StopWorker):
            worker.run(gpu.process, replace(gpu.bootstrap, worker=kept, record_limit_bytes=1 << 20))
    start, step, end = frames_of(path)
    assert isinstance(start, SegmentStart)
    assert (start.num_blocks, start.epoch, start.shape, start.device) == (NUM_BLOCKS, 3, SHAPE, "cpu")
    assert isinstance(step, RecordedStep)
    assert end == SegmentEnd("stopped")
