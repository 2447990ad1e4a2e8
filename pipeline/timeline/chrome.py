"""Converts trace records to events of Chrome's JSON array format, which ui.perfetto.dev and chrome://tracing load.

Each role is a process, and each trace ring a thread. The process "device" has one thread, the compute stream. Arrows
lead from a step's plan over its launch and its time on the device to the place where its result is applied. Times are
in us since the launch. Format: "Trace Event Format", Google, 2016.
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
        """Return the first events, which name the processes and threads. `label` names the engine."""
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
        """Return the events of the records [n, 6] of each track, in order of time.

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
        """Return a mark with the number of records of this track that have been lost so far."""
        head = self._head("dropped", "i", track, now_ns)
        return f'{{{head},"s":"t","args":{{"records":{num_dropped}}}}}'

    def _step(self, kind: int, start_ns: int, duration_ns: int, ticket: int) -> list[str]:
        """Return a step on the device. The clock may be adjusted while a step runs, so its start is moved behind the
        last end."""
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
    """Return the process and the thread of a track."""
    if track == DEVICE:
        return DEVICE, COMPUTE
    process, _, thread = track.rpartition(".")
    if process and not thread.isdigit():  # a number belongs to the process: "tokenizer.0"
        return process, thread
    return track, "main"


def _args(names: tuple[str, ...], values: list[int]) -> str:
    """Return a JSON object of names and their values."""
    return "{" + ",".join([f'"{name}":{value}' for name, value in zip(names, values, strict=False)]) + "}"


def _microseconds(ns: int) -> str:
    """Return the exact value as a JSON number."""
    sign, ns = ("-", -ns) if ns < 0 else ("", ns)
    return f"{sign}{ns // 1000}.{ns % 1000:03d}"
