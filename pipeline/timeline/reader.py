"""Reads a recorded timeline, even if its recorder was killed."""

from __future__ import annotations

import json
import os
import zlib
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ipc.errors import ConfigError
from pipeline.timeline.chrome import DEVICE

_GZIP_MAGIC: Final = b"\x1f\x8b"
_NOT_OURS: Final = "is no timeline that `python -m pipeline.launch --timeline` has written"


@dataclass(frozen=True)
class Bar:
    """One activity. Times in seconds since the launch."""

    name: str
    start_s: float
    end_s: float
    args: dict[str, int]


@dataclass(frozen=True)
class Timeline:
    """Bars by process, all its threads together, in order of their start. `label` names the engine.

    The processes come in the recorded order, from top to bottom.
    """

    label: str
    bars: dict[str, list[Bar]] = field(repr=False)

    @property
    def steps(self) -> list[Bar]:
        """The steps on the device, in order."""
        return self.bars.get(DEVICE, [])


def load_timeline(path: str | os.PathLike[str]) -> Timeline:
    """Read a timeline. Raises ConfigError for a file that cannot be read, or is not a timeline."""
    events = load_events(path)
    bars: dict[str, list[Bar]] = defaultdict(list)
    try:
        named = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
        names = dict(sorted(named.items()))  # process ids are in the order of the tracks
        label = "".join(event["args"]["labels"] for event in events if event["name"] == "process_labels")
        for event in events:
            if event["ph"] == "X":
                start_s = event["ts"] * 1e-6
                bar = Bar(event["name"], start_s, start_s + event["dur"] * 1e-6, event["args"])
                bars[names[event["pid"]]].append(bar)
    except (KeyError, TypeError):
        raise ConfigError(f"{path}: {_NOT_OURS}") from None
    for of_process in bars.values():
        of_process.sort(key=lambda bar: bar.start_s)
    return Timeline(label, {name: bars[name] for name in names.values() if name in bars})


def load_events(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the events of one of our traces, as far as it was written. Raises ConfigError as above."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        text = (_unpack(data) if data.startswith(_GZIP_MAGIC) else data).decode(errors="replace")
    except zlib.error as error:
        raise ConfigError(f"{path}: cannot be unpacked: {error}") from None
    head, *lines = text.split("\n")
    if head != "[":
        raise ConfigError(f"{path}: {_NOT_OURS}")
    events = []
    for number, line in enumerate(lines, start=2):
        try:
            if line not in ("]", ""):
                events.append(json.loads(line.removesuffix(",")))
        except json.JSONDecodeError as error:
            if number <= len(lines):  # the last line may be cut off
                raise ConfigError(f"{path}: line {number} is not an event: {error}") from None
    return events


def _unpack(data: bytes) -> bytes:
    """Unpack all gzip members. The last one may be cut off."""
    unpacked = b""
    while data:
        member = zlib.decompressobj(wbits=31)
        unpacked += member.decompress(data)
        data = member.unused_data
    return unpacked
