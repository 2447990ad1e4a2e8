"""Replays a recording and compares every result with the recorded one. The steps run in `workers/gpu/recording`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ipc.errors import ConfigError, ModelUnsupported
from pipeline.recording.comparison import Comparison
from workers.gpu.recording.frames import Frame, RecordedStep, RecordingFile, SegmentEnd, SegmentStart

if TYPE_CHECKING:
    from workers.gpu.recording.replayer import Replayer

Say = Callable[[str], None]


@dataclass
class Replay:
    """What a replay has found. `notes`: one line each, about what is not as it was, or missing in the file."""

    comparison: Comparison = field(default_factory=Comparison)
    notes: list[str] = field(default_factory=list)


def replay(path: str, *, model: str | None = None, device: str | None = None, say: Say = print) -> Replay:
    """Run every step of a recording again.

    Args:
        path: the file.
        model: the model's folder on this machine; None = where it was.
        device: "cpu" or "cuda"; None = as configured when it was recorded.
        say: is called with a line for each segment.

    Raises ConfigError, with the file's name, for a file that is damaged, or was recorded with another model or another
    version of ringfeed.
    """
    with closing(RecordingFile(path)) as file, closing(_Segments(model, device, say)) as segments:
        try:
            for frame in file.frames():
                segments.take(frame)
            segments.end("is cut off" if file.is_cut else "ends")
        except (ConfigError, ModelUnsupported) as error:
            text = str(error)
            raise ConfigError(text if text.startswith(f"{path}: ") else f"{path}: {text}") from None
        return segments.found


class _Segments:
    """Runs segment after segment, each on a newly loaded model."""

    def __init__(self, model: str | None, device: str | None, say: Say) -> None:
        self.found = Replay()
        self._model = model
        self._device = device
        self._say = say
        self._replayer: Replayer | None = None  # of a segment that has not ended

    def take(self, frame: Frame) -> None:
        """Raises ConfigError for a frame that cannot stand there, and for a model that cannot be loaded."""
        comparison = self.found.comparison
        if isinstance(frame, SegmentStart):
            self.end("begins")
            comparison.begin_segment()
            self._begin(frame)
        elif self._replayer is None:
            raise ConfigError("is damaged: a step stands in front of its segment's start")
        elif isinstance(frame, RecordedStep):
            try:
                comparison.add(frame.ticket, *self._replayer.run(frame))
            except ConfigError as error:
                raise ConfigError(f"is damaged: step {comparison.num_steps + 1}: {error}") from None
            except (
                IndexError,
                RuntimeError,
            ) as error:  # of torch: values that no scheduler makes, or too little memory
                text = " ".join(str(error).split())
                raise ConfigError(f"step {comparison.num_steps + 1} cannot be run: {text}") from error
        elif isinstance(frame, SegmentEnd):
            if frame.reason == "full":
                self.found.notes.append("the recording had reached its limit: the engine went on behind its last step")
            self.close()

    def end(self, what: str) -> None:
        """The next segment "begins", or the file "ends" or "is cut off"."""
        number = self.found.comparison.num_segments
        if self._replayer is not None:
            where = f"segment {number + 1} begins" if what == "begins" else f"the file {what}"
            self.found.notes.append(
                f"segment {number} has no end: {where} there, because a process was killed or the disk was full"
            )
        if what != "begins" and number == 0:
            raise ConfigError("holds no steps: no GPU process had finished its start")
        self.close()

    def close(self) -> None:
        """Drop the model: the next one may need its memory."""
        if self._replayer is not None:
            self._replayer.close()
            self._replayer = None

    def _begin(self, start: SegmentStart) -> None:
        from workers.gpu.recording.recorded_model import load_recorded
        from workers.gpu.recording.replayer import Replayer

        def progress(*_: object) -> None:
            """Loading is not shown."""

        number = self.found.comparison.num_segments
        self._say(f"segment {number}: loading {self._model or start.model.path}")
        loaded, changes = load_recorded(start, self._model, self._device, progress)
        self.found.notes += [f"segment {number}: {change}" for change in changes]
        self._replayer = Replayer(start, loaded, progress)
