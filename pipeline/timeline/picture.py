"""Draws a window of one or more timelines: bars for the activities of each process and the device, idle time in red.

Several timelines are drawn above each other on one time scale, so that their idle times can be compared. Only this
module needs matplotlib: `pip install 'ringfeed[plot]'`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Patch

from ipc.errors import ConfigError
from ipc.trace import KINDS, Span
from pipeline.timeline.chrome import DEVICE
from pipeline.timeline.reader import Bar, Timeline

DEFAULT_NUM_STEPS: Final = 8  # in the default window

_WIDTH: Final = 12.0  # inches
_MARGINS: Final = (1.05, 0.3)  # left and right, inches
_ROW_HEIGHT: Final = 0.34
_TITLE_HEIGHT: Final = 0.3
_FOOT_HEIGHT: Final = 0.62  # for the scale and the legend
_MAX_ARROWS: Final = 60  # more of them are a grey veil
_CHARACTER: Final = 0.085  # the width of one, with some air
_TITLES: Final = {"gpu": "GPU process", DEVICE: "device"}
_INK, _FAINT, _IDLE = "#22223b", "#d8dbe2", "#e63946"
_STEPS: Final = ("#2a7f9e", "#69b3c8")
_AWAKE: Final = KINDS[Span.AWAKE].name
_COLOURS: Final = {
    KINDS[Span.PLAN].name: "#f4a261",
    KINDS[Span.APPLY].name: "#e9c46a",
    KINDS[Span.LAUNCH].name: "#7b6fd0",
    KINDS[Span.PUBLISH].name: "#b9a7ee",
}
_OTHER: Final = "#8d99ae"  # text and messages
_STYLE: Final = {"svg.fonttype": "none", "svg.hashsalt": "ringfeed", "font.family": "sans-serif", "font.size": 9.0}


@dataclass(frozen=True)
class Window:
    """A part of a timeline. `start_s` counts from its first step on the device, so that it means the same in every
    file."""

    start_s: float
    length_s: float


def middle_window(timeline: Timeline) -> Window:
    """Return a window of a few steps from the middle of the run."""
    steps = timeline.steps
    first = max(0, (len(steps) - DEFAULT_NUM_STEPS) // 2)
    last = min(first + DEFAULT_NUM_STEPS, len(steps)) - 1
    return Window(steps[first].start_s - steps[0].start_s, steps[last].end_s - steps[first].start_s)


def draw(timelines: Sequence[Timeline], window: Window | None, path: str | os.PathLike[str]) -> None:
    """Write the picture; its format follows from the path's ending: svg, png, pdf.

    Without a `window`, each timeline shows its middle, for the length of the first one's window. Raises ConfigError if
    there is nothing to draw or the format is unknown.
    """
    if not os.path.splitext(path)[1]:
        raise ConfigError(f"-o {os.fspath(path)}: must end in .svg, .png or .pdf, which selects the format")
    for timeline in timelines:
        if not timeline.steps:
            raise ConfigError(f"{timeline.label or 'a timeline'}: no step ran on the device: nothing to draw")
    length_s = (window or middle_window(timelines[0])).length_s
    panels = [_Panel(timeline, Window((window or middle_window(timeline)).start_s, length_s)) for timeline in timelines]
    rows = list(
        dict.fromkeys(row for panel in panels for row, bars in panel.bars.items() if bars)
    )  # from top to bottom
    rows.sort(key=DEVICE.__eq__)  # the device stays lowest where a second timeline has further processes
    if DEVICE not in rows:
        longest_s = max(timeline.steps[-1].end_s - timeline.steps[0].start_s for timeline in timelines)
        raise ConfigError(
            f"--window: no step runs in it; the last one ends {longest_s:.3f} s after the first one starts"
        )
    panel_height = _ROW_HEIGHT * (len(rows) + 1) + _TITLE_HEIGHT
    height = panel_height * len(panels) + _FOOT_HEIGHT
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(_WIDTH, height))
        for index, panel in enumerate(panels):
            bottom = height - panel_height * (index + 1)
            axes = figure.add_axes((
                _MARGINS[0] / _WIDTH,
                bottom / height,
                1 - sum(_MARGINS) / _WIDTH,
                (panel_height - _TITLE_HEIGHT) / height,
            ))  # fmt: skip
            panel.draw(axes, rows, is_last=index == len(panels) - 1)
        figure.legend(
            handles=_legend(), loc="lower center", ncols=9, frameon=False, fontsize=8, handlelength=1.2,
            columnspacing=1.4,
        )  # fmt: skip
        try:
            figure.savefig(path, dpi=150, metadata={"Date": None} if str(path).endswith(".svg") else None)
        except (OSError, ValueError) as error:
            raise ConfigError(f"-o {path}: {error}") from None


class _Panel:
    """One timeline's part of the picture. Times in seconds from the window's start."""

    def __init__(self, timeline: Timeline, window: Window) -> None:
        self.label = timeline.label
        steps = timeline.steps
        start_s = steps[0].start_s + window.start_s
        self.length_s = window.length_s
        # The device's idle times between two steps, cut to the window.
        self.gaps = [
            (start, end)
            for a, b in pairwise(steps)
            if (end := min(b.start_s - start_s, self.length_s)) > (start := max(a.end_s - start_s, 0.0))
        ]
        # The end of the last step, or of the window.
        self.run_s = max(0.0, min(steps[-1].end_s - start_s, self.length_s))
        self.bars = {
            process: [
                Bar(bar.name, bar.start_s - start_s, bar.end_s - start_s, bar.args)
                for bar in bars
                if bar.end_s > start_s and bar.start_s < start_s + window.length_s
            ]
            for process, bars in timeline.bars.items()
        }

    def caption(self) -> str:
        """Return the device's idle share in the window, and the time per step."""
        if not self.run_s:
            return "after the last step"
        idle_s = sum(end - start for start, end in self.gaps)
        text = f"device idle {idle_s / self.run_s:.1%} of {self.run_s * 1e3:.0f} ms"
        steps = self.bars.get(DEVICE, [])
        if len(steps) > 1:
            pace_s = (steps[-1].start_s - steps[0].start_s) / (len(steps) - 1)
            text += f"  ·  {pace_s * 1e3:.2f} ms from step to step"
        return text

    def draw(self, axes: Axes, rows: Sequence[str], *, is_last: bool) -> None:
        places = {row: len(rows) - 1 - index for index, row in enumerate(rows)}
        for row, place in places.items():
            if row == DEVICE:
                self._draw_device(axes, place)
            else:
                self._draw_process(axes, row, place)
        if "scheduler" in places and DEVICE in places:
            self._draw_arrows(axes, places["scheduler"], places[DEVICE])
        axes.set_xlim(0, self.length_s)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_yticks(list(places.values()), [_TITLES.get(row, row) for row in places])
        axes.tick_params(axis="y", length=0, labelcolor=_INK)
        axes.tick_params(axis="x", colors="#6c757d", labelbottom=is_last, length=3 if is_last else 0)
        axes.grid(axis="x", color="#eceef2", linewidth=0.7)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left", "bottom"):
            axes.spines[side].set_visible(False)
        axes.set_title(self.label, loc="left", fontsize=10, fontweight="bold", color=_INK)
        axes.set_title(self.caption(), loc="right", fontsize=9.5, color=_INK)
        if is_last:
            axes.xaxis.set_major_formatter(lambda time_s, _: f"{time_s * 1e3:g} ms")

    def _draw_process(self, axes: Axes, row: str, place: int) -> None:
        """Draw when the process was awake, and above that its activities."""
        layers: dict[tuple[str, float], list[tuple[float, float]]] = {}
        for bar in self.bars.get(row, []):
            style = (_FAINT, 0.44) if bar.name == _AWAKE else (_COLOURS.get(bar.name, _OTHER), 0.56)
            layers.setdefault(style, []).append((bar.start_s, bar.end_s - bar.start_s))
        for (colour, height), spans in sorted(layers.items(), key=lambda layer: layer[0][1]):
            axes.broken_barh(spans, (place - height / 2, height), facecolors=colour, linewidth=0)

    def _draw_device(self, axes: Axes, place: int) -> None:
        blocks: dict[str, list[tuple[float, float]]] = {_IDLE: [], _STEPS[0]: [], _STEPS[1]: []}
        for start, end in self.gaps:
            blocks[_IDLE].append((start, end - start))
            idle_ms = f"{(end - start) * 1e3:.1f}"
            self._label(axes, place, start, end, f"idle {idle_ms} ms", idle_ms)
        for step in self.bars.get(DEVICE, []):
            ticket, start, end = step.args["ticket"], max(step.start_s, 0.0), min(step.end_s, self.length_s)
            blocks[_STEPS[ticket % 2]].append((start, end - start))
            self._label(axes, place, start, end, f"step {ticket}", f"{ticket}")
        for colour, spans in blocks.items():
            axes.broken_barh(spans, (place - 0.4, 0.8), facecolors=colour, linewidth=0)

    def _label(self, axes: Axes, place: int, start: float, end: float, *texts: str) -> None:
        """Write the first of the texts that fits into a bar; no text if none fits."""
        inches = (end - start) / self.length_s * (_WIDTH - sum(_MARGINS))
        if text := next((text for text in texts if len(text) * _CHARACTER < inches), None):
            axes.text((start + end) / 2, place, text, ha="center", va="center_baseline", color="white", fontsize=8.5)

    def _draw_arrows(self, axes: Axes, scheduler: int, device: int) -> None:
        """Draw an arrow from a step's plan to its start on the device. It shows how far ahead the host is."""
        steps = self.bars.get(DEVICE, [])
        if len(steps) > _MAX_ARROWS:
            return
        starts = {step.args["ticket"]: step.start_s for step in steps}
        for bar in self.bars.get("scheduler", []):
            start = starts.get(bar.args.get("ticket", 0))
            if bar.name == KINDS[Span.PLAN].name and start is not None and 0 <= start <= self.length_s:
                axes.add_patch(
                    FancyArrowPatch(
                        (bar.end_s, scheduler - 0.3), (start, device + 0.42), arrowstyle="-|>", mutation_scale=6,
                        linewidth=0.7, color=_INK, alpha=0.55, shrinkA=0, shrinkB=0,
                    )
                )  # fmt: skip


def _legend() -> list[Patch]:
    entries = list(_COLOURS.items())
    entries += [
        ("messages and text", _OTHER),
        ("awake", _FAINT),
        ("device computes", _STEPS[0]),
        ("device idle", _IDLE),
    ]
    return [Patch(color=colour, label=name, linewidth=0) for name, colour in entries]
