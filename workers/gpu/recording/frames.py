"""The frames of a recording, and the file that holds them.

    ringfeed recording 1\\n
    chunk | chunk | ...

A chunk is a header and zlib's compressed bytes of consecutive frames, each behind its length. The header has the
chunk's size and a checksum, so a cut or damaged file is seen before anything in it is used. A GPU process writes one
segment: `SegmentStart`, steps in the order of their results, `SegmentEnd`. A segment without an end belongs to a
process that was killed. Knows neither torch nor rings.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from typing import Final

import msgspec

from ipc.codec import MAX_FRAME_BYTES, decode
from ipc.errors import ConfigError, InvalidRequest, ProtocolError
from ipc.records import StepShape
from workers.gpu.config import CacheConfig, ModelConfig

FILE_START: Final = b"ringfeed recording 1\n"
MAX_CHUNK_BYTES: Final = 2 * MAX_FRAME_BYTES  # of frames
CHUNK: Final = b"RFch"
LAST_CHUNK: Final = b"RFla"  # the file has reached its limit: no process may add to it
_HEADER: Final = struct.Struct("<4sIII")  # kind, bytes of the compressed frames, bytes of the frames, CRC-32 of both
_LENGTH: Final = struct.Struct("<I")
_LEVEL: Final = 1


class SegmentStart(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What a GPU process is, as far as it decides about tokens.

    `model.path` is the folder on the machine of the recording. `layouts` are the hashes of the records' layouts.
    `config_sha256` and `weights_sha256` are those of `workers/gpu/model/fingerprint.py`.
    """

    model: ModelConfig
    cache: CacheConfig
    shape: StepShape
    depth: int
    num_blocks: int
    layouts: dict[str, int]
    config_sha256: str
    weights_sha256: str
    device: str  # its name: "cpu", "NVIDIA H100 80GB HBM3"
    num_threads: int
    versions: dict[str, str]  # of torch and others, by name
    epoch: int  # of the GPU process
    started_s: float  # unix time


class Upload(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What an admission copies to its row: int32 token ids, and the words of its long values."""

    admission: int  # index into the step's admissions
    token_ids: bytes
    long_values: bytes


class StepMasks(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The masks that a step got of one grammar process, [num_masks, mask_words] int32; None = they were closed."""

    worker: int
    masks: bytes | None


class RecordedStep(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """A step that was published. `step` and `result` are packed records (`packing.py`)."""

    ticket: int
    step: bytes
    uploads: list[Upload]
    masks: list[StepMasks]
    result: bytes


class RingsReplaced(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The scheduler was started again: tickets begin at 1 again. The rows and blocks on the device stay."""

    epoch: int  # of the new rings


class SegmentEnd(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The last frame of a segment. `reason`: "stopped", "failed" (the process ended by an error) or "full"."""

    reason: str


Frame = SegmentStart | RecordedStep | RingsReplaced | SegmentEnd


def pack_chunk(frames: list[bytes], kind: bytes = CHUNK) -> bytes:
    """A whole chunk of encoded frames."""
    raw = b"".join([part for frame in frames for part in (_LENGTH.pack(len(frame)), frame)])
    data = zlib.compress(raw, _LEVEL)
    return _HEADER.pack(kind, len(data), len(raw), _checksum(len(raw), data)) + data


def find_end(fd: int) -> tuple[int, bool]:
    """Where the last whole chunk of a file ends, and whether the file has reached its limit.

    A process that was killed leaves a part of a chunk behind this place.
    """
    size, at, is_full = os.fstat(fd).st_size, len(FILE_START), False
    while len(header := os.pread(fd, _HEADER.size, at)) == _HEADER.size:
        kind, num_bytes, _, _ = _HEADER.unpack(header)
        if kind not in (CHUNK, LAST_CHUNK) or at + _HEADER.size + num_bytes > size:
            break
        at += _HEADER.size + num_bytes
        is_full = kind == LAST_CHUNK
    return at, is_full


class RecordingFile:
    """A recording to read. `is_cut` is known when all frames are read: the last chunk is not whole.

    Raises ConfigError, with the file's name, if it cannot be read or is no recording.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.is_cut = False
        try:
            self._file = open(path, "rb")  # noqa: SIM115
            self.num_bytes = os.fstat(self._file.fileno()).st_size
            start = self._file.read(len(FILE_START))
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be read: {error.strerror}") from None
        if start != FILE_START:
            raise ConfigError(f"{self.path}: is no recording of this version of ringfeed")

    def frames(self) -> Iterator[Frame]:
        """Yield every frame. Raises ConfigError at the first chunk that is damaged."""
        at = len(FILE_START)
        while header := self._file.read(_HEADER.size):
            if len(header) < _HEADER.size:
                self.is_cut = True
                return
            kind, num_bytes, num_raw, checksum = _HEADER.unpack(header)
            if kind not in (CHUNK, LAST_CHUNK) or num_raw > MAX_CHUNK_BYTES or num_bytes > MAX_CHUNK_BYTES:
                raise self._damaged(at, "no chunk begins there")
            data = self._file.read(num_bytes)
            if len(data) < num_bytes:
                self.is_cut = True
                return
            if _checksum(num_raw, data) != checksum:
                raise self._damaged(at, "the checksum is wrong")
            try:
                yield from _frames(data, num_raw)
            except (ProtocolError, InvalidRequest) as error:
                raise self._damaged(at, str(error)) from None
            at += len(header) + num_bytes

    @property
    def position(self) -> int:
        """Bytes that are read so far."""
        return self._file.tell()

    def close(self) -> None:
        self._file.close()

    def _damaged(self, at: int, why: str) -> ConfigError:
        return ConfigError(f"{self.path}: is damaged at byte {at}: {why}")


def _frames(data: bytes, num_raw: int) -> Iterator[Frame]:
    """The frames of a chunk. Raises ProtocolError for bytes that are no frames of ours."""
    unzip = zlib.decompressobj()
    try:
        raw = memoryview(unzip.decompress(data, max(1, num_raw)))
    except zlib.error as error:
        raise ProtocolError(f"it cannot be unpacked ({error})") from None
    if len(raw) != num_raw or unzip.unconsumed_tail:
        raise ProtocolError("it has another size than its header says")
    at = 0
    while at < num_raw:
        end = at + _LENGTH.size
        if end <= num_raw:
            end += _LENGTH.unpack(raw[at:end])[0]
        if end > num_raw:
            raise ProtocolError("its last frame is cut")
        frame: Frame = decode(raw[at + _LENGTH.size : end], Frame)
        yield frame
        at = end


def _checksum(num_raw: int, data: bytes) -> int:
    return zlib.crc32(data, num_raw & 0xFFFFFFFF)
