"""Trace records as events of Chrome's JSON array format, which ui.perfetto.dev and chrome://tracing load.

One process a role, one thread a trace ring, and a process "device" whose one thread is the compute stream. Arrows go
from a step's plan over its launch and its time on the device to where its result is applied. Times are in us since the
launch. Format: "Trace Event Format", Google, 2016.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Final

import numpy as np

from ipc.trace import KINDS, Form, Span

DEVICE, COMPUTE = "device", "compute stream"
_ARROW: Final[dict[int, str]] = {Span.PLAN: "s", Span.LAUNCH: "t", Span.STEP: "t", Span.APPLY: "f"}  # flow phases

Records = np.ndarray[Any, np.dtype[np.int64]]


class ChromeEvents:
    """Turns drained records into events, a line of JSON each.

    Tracks are "PROCESS" or, for a further thread, "PROCESS.NAME", in their order from top to bottom; the device comes
    last. `origin_ns`: CLOCK_MONOTONIC of time 0.
    """

    def __init__(self, tracks: Iterable[str], origin_ns: int) -> None:
        self._origin_ns = origin_ns
        self._places = {track: _place(track) for track in (*tracks, DEVICE)}  # process and thread of each
        processes = dict.fromkeys(process for process, _ in self._places.values())
        self._pids = {process: number for number, process in enumerate(processes, start=1)}
        threads = sorted({thread for _, thread in self._places.values()})
        self._tids = {thread: number for number, thread in enumerate(threads, start=1)}
        self._ids = {
            track: f'"pid":{self._pids[process]},"tid":{self._tids[thread]}'
            for track, (process, thread) in self._places.items()
        }
        self._planned: dict[int, tuple[int, int]] = {}  # by ticket: sequences and tokens, until the step has run
        self._launched: dict[int, tuple[int, int]] = {}  # by ticket: sequences and tokens of its bucket
        self._device_end_ns = 0

    def names(self, label: str) -> list[str]:
        """The first events: what the processes and threads are called. `label` says what engine this is."""
        events = []
        for process, thread in self._places.values():
            pid, tid = self._pids[process], self._tids[thread]
            for name, args in (
                ("process_name", {"name": process}),
                ("process_sort_index", {"sort_index": pid}),
                ("thread_name", {"name": thread}),
            ):
                events.append(json.dumps({"name": name, "ph": "M", "pid": pid, "tid": tid, "ts": 0, "args": args}))
        args = {"labels": label}
        events.append(
            json.dumps(
                {"name": "process_labels", "ph": "M", "pid": self._pids[DEVICE], "tid": 0, "ts": 0, "args": args}
            )
        )
        return events

    def events(self, drained: dict[str, Records]) -> list[str]:
        """Events of the records [n, 6] of each track, in order of time.

        The scheduler's records must have been drained before the GPU process's: a step that it has applied was
        launched.
        """
        rows = [(track, *row) for track, records in drained.items() for row in records.tolist()]
        for _, kind, _, _, ticket, first, second in rows:
            if kind == Span.PLAN:
                self._planned[ticket] = first, second
            elif kind == Span.LAUNCH:
                self._launched[ticket] = first, second
        rows.sort(key=lambda row: (row[2], -row[3]))
        events: list[str] = []
        for track, kind, start_ns, duration_ns, *values in rows:
            form = KINDS[kind].form
            if form is Form.COUNTER:
                head = self._head(KINDS[kind].name, "C", track, start_ns)
                events.append(f'{{{head},"args":{_args(KINDS[kind].values, values)}}}')
            elif form is Form.DEVICE:
                events += self._step(kind, start_ns, duration_ns, values[0])
            else:
                events += self._span(track, kind, start_ns, duration_ns, KINDS[kind].values, values)
        return events

    def dropped(self, track: str, now_ns: int, num_dropped: int) -> str:
        """A mark: up to now, so many records of this track were lost."""
        head = self._head("dropped", "i", track, now_ns)
        return f'{{{head},"s":"t","args":{{"records":{num_dropped}}}}}'

    def _step(self, kind: int, start_ns: int, duration_ns: int, ticket: int) -> list[str]:
        """A step on the device. Its clock may be set while it runs, and steps do not overlap."""
        end_ns = start_ns + duration_ns
        start_ns = max(start_ns, self._device_end_ns)
        self._device_end_ns = end_ns = max(end_ns, start_ns)
        names, values = KINDS[kind].values, [ticket]
        for source, of in ((self._planned, Span.PLAN), (self._launched, Span.LAUNCH)):
            if ticket in source:
                names += KINDS[of].values[1:]
                values += source[ticket]
            for old in [known for known in source if known <= ticket]:
                del source[old]
        return self._span(DEVICE, kind, start_ns, end_ns - start_ns, names, values)

    def _span(
        self, track: str, kind: int, start_ns: int, duration_ns: int, names: tuple[str, ...], values: list[int]
    ) -> list[str]:
        head, duration = self._head(KINDS[kind].name, "X", track, start_ns), _microseconds(max(duration_ns, 1))
        events = [f'{{{head},"dur":{duration},"args":{_args(names, values)}}}']
        if kind in _ARROW and values[0]:  # a ticket; 0: nothing was planned
            arrow = self._head("step", _ARROW[kind], track, start_ns)
            events.append(f'{{{arrow},"cat":"step","id":{values[0]},"bp":"e"}}')
        return events

    def _head(self, name: str, phase: str, track: str, start_ns: int) -> str:
        time = _microseconds(start_ns - self._origin_ns)
        return f'"name":"{name}","ph":"{phase}",{self._ids[track]},"ts":{time}'


def _place(track: str) -> tuple[str, str]:
    """The process and the thread that a track stands for."""
    if track == DEVICE:
        return DEVICE, COMPUTE
    process, _, thread = track.rpartition(".")
    if process and not thread.isdigit():  # a number belongs to the process: "tokenizer.0"
        return process, thread
    return track, "main"


def _args(names: tuple[str, ...], values: list[int]) -> str:
    """A JSON object of as many values as there are names."""
    return "{" + ",".join([f'"{name}":{value}' for name, value in zip(names, values, strict=False)]) + "}"


def _microseconds(ns: int) -> str:
    """Exact, as a JSON number."""
    sign, ns = ("-", -ns) if ns < 0 else ("", ns)
    return f"{sign}{ns // 1000}.{ns % 1000:03d}"
