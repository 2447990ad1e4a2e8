"""Records the steps of this process: the tap on the executor, and the thread that writes the file.

    launching or completion thread: result is complete -> copy record, uploads, masks, result -> queue
    recording thread, ten times a second:                                       queue -> compress -> write

Everything is copied just before the step's records are released, when all of it is complete and none of it can change.
The other thread compresses and writes without the interpreter lock. If the file reaches its limit, cannot be written,
or is written too slowly, the recording ends with one line in the log, and the engine goes on.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from typing import Final

from ipc.codec import encode
from ipc.errors import ProtocolError
from ipc.records import ResultRecord
from workers.gpu.execution.attached_rings import AttachedRings
from workers.gpu.execution.steps import Submitted
from workers.gpu.recording.frames import (
    LAST_CHUNK,
    Frame,
    RecordedStep,
    RingsReplaced,
    SegmentEnd,
    SegmentStart,
    StepMasks,
    Upload,
    find_end,
    pack_chunk,
)
from workers.gpu.recording.packing import StepPacking

logger = logging.getLogger(__name__)

_INTERVAL_S: Final = 0.1  # between writes: what a killed process can lose
_MAX_QUEUED_BYTES: Final = 64 << 20
_CHUNK_BYTES: Final = 4 << 20  # of frames, about
_END_BYTES: Final = 4096  # of the limit, for the last chunk
_NICENESS: Final = 10  # the engine goes first if there are few cores


class Recording:
    """One segment of a file, from `start` to `close`.

    Args:
        fd: the file, open for reading and appending. The launcher has written its first line.
        limit_bytes: the recording ends before the file is larger.
        start: what this process is.
    """

    def __init__(self, fd: int, limit_bytes: int, start: SegmentStart) -> None:
        self._fd = fd
        self._limit_bytes = limit_bytes
        self._packing = StepPacking(start.shape)
        self._queue: deque[bytes] = deque()
        self._num_queued = 0  # bytes, so far
        self._num_taken = 0  # bytes, by the recording thread so far
        self._stopped = threading.Event()
        self.is_on = True
        self._thread: threading.Thread | None = None
        self._end, is_full = find_end(fd)
        if is_full:
            self._give_up("is full: this process is not recorded")
            return
        self._put(start)
        self._thread = threading.Thread(target=self._run, name="recording", daemon=True)
        self._thread.start()

    def take(self, rings: AttachedRings, step: Submitted, result: ResultRecord) -> None:
        """Copy a step and its complete result. Call it before the step's records are released."""
        if not self.is_on:
            return
        record, ticket = step.record, step.ticket
        packed = self._packing.pack(record, rings.step.memory(ticket), rings.result.memory(ticket))
        uploads = [
            Upload(i, *words)
            for i in range(int(record.num_admissions[0]))
            if any(words := rings.uploads.read(record, i))
        ]
        masks = [StepMasks(part.worker, None if part in step.closed else rings.masks.read(part)) for part in step.owed]
        self._put(RecordedStep(ticket, packed[0], uploads, masks, packed[1]))

    def rings_replaced(self, epoch: int) -> None:
        """The next step comes from new rings."""
        if self.is_on:
            self._put(RingsReplaced(epoch))

    def close(self, reason: str) -> None:
        """Write what is queued, and the segment's end. `reason`: see SegmentEnd."""
        if self.is_on:
            self._put(SegmentEnd(reason))
            self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        self.is_on = False

    def _put(self, frame: Frame) -> None:
        try:
            data = encode(frame)
        except ProtocolError as error:
            self._give_up(f"ends here: a step has too many bytes ({error})")
            return
        self._num_queued += len(data)
        self._queue.append(data)
        if self._num_queued - self._num_taken > _MAX_QUEUED_BYTES:
            self._give_up(f"ends here: {_MAX_QUEUED_BYTES >> 20} MiB of steps wait to be written; the disk is too slow")

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        try:
            os.ftruncate(self._fd, self._end)  # what a killed process has written of a chunk
            while not self._stopped.wait(_INTERVAL_S):
                self._write_queued()
            self._write_queued()
        except OSError as error:
            self._give_up(f"cannot be written any more ({error.strerror}): it ends here")
            os.ftruncate(self._fd, self._end)
        finally:
            self._queue.clear()

    def _write_queued(self) -> None:
        while self._queue and self.is_on:
            frames, size = [], 0
            while self._queue and size < _CHUNK_BYTES:
                frames.append(self._queue.popleft())
                size += len(frames[-1])
            self._num_taken += size
            chunk = pack_chunk(frames)
            if self._end + len(chunk) + _END_BYTES > self._limit_bytes:
                self._give_up(f"ends here: it has reached its limit ({self._limit_bytes >> 20} MiB)")
                chunk = pack_chunk([encode(SegmentEnd("full"))], LAST_CHUNK)
            self._write(chunk)

    def _write(self, chunk: bytes) -> None:
        left = memoryview(chunk)
        while left:
            left = left[os.write(self._fd, left) :]  # it is open for appending
        self._end += len(chunk)

    def _give_up(self, why: str) -> None:
        self.is_on = False
        self._stopped.set()  # the recording thread ends, and frees what is queued
        logger.warning("the recording %s", why)
