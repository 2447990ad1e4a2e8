"""Notices processes that hang: each is asked again and again whether its loop still goes round. Knows no sockets.

    no answer, or work without progress, for SUSPECT_S         clients are told that the engine does not serve
                                         for hang_timeout_s    the process counts as dead

Only processes that have said Ready are asked. Before, `start_timeout_s` bounds their start. A process may announce work
that takes longer (`Busy`). One that says that it ends (`Failed`) has EXIT_S to do so. If the launcher itself was
stopped for a while, everybody gets that time back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from pipeline.engine.supervisor_config import SupervisorConfig

PING_INTERVAL_S: Final = 2.0  # at most; a quarter of a shorter hang_timeout_s
SUSPECT_S: Final = 5.0  # at most; half of a shorter hang_timeout_s
EXIT_S: Final = 10.0  # at most; half of a shorter hang_timeout_s. A process answers its clients before it ends


@dataclass
class _Watched:
    heard: float  # when it last answered, or began to be watched
    stalled_s: float = 0.0
    busy_until: float = 0.0
    is_ready: bool = False
    ends: float | None = None  # when it said that it ends


class Heartbeats:
    """Times are seconds of one monotonic clock."""

    def __init__(self, config: SupervisorConfig) -> None:
        self._config = config
        self._interval_s = min(PING_INTERVAL_S, config.hang_timeout_s / 4)
        self._suspect_s = min(SUSPECT_S, config.hang_timeout_s / 2)
        self._exit_s = min(EXIT_S, config.hang_timeout_s / 2)
        self._watched: dict[str, _Watched] = {}
        self._next_ping = 0.0  # 0: before the first round
        self._amnesty_until = 0.0  # until then work without progress is no hang

    def began(self, name: str, now: float) -> None:
        """A process was spawned."""
        self._watched[name] = _Watched(heard=now)

    def ready(self, name: str, now: float) -> None:
        """A process is ready: from now on it is asked."""
        watched = self._watched[name]
        watched.is_ready, watched.heard = True, now

    def ends(self, name: str, now: float) -> None:
        """A process has said that it ends: it answers nothing any more."""
        if name in self._watched:
            self._watched[name].ends = now

    def killed(self, name: str) -> None:
        """A process was killed. It stays known until it has ended, and is not killed again."""
        self.ends(name, math.inf)

    def starting(self, names: Iterable[str]) -> frozenset[str]:
        """Those of these processes that have not been ready, and were not forgotten."""
        return frozenset(name for name in names if name in self._watched and not self._watched[name].is_ready)

    def ended(self, name: str) -> None:
        self._watched.pop(name, None)

    def answered(self, name: str, stalled_s: float, now: float) -> None:
        """A process has answered; its oldest work has made no progress for `stalled_s` seconds."""
        if name in self._watched:
            watched = self._watched[name]
            watched.heard, watched.stalled_s = now, stalled_s

    def busy(self, name: str, seconds: float, now: float) -> None:
        """A process may answer nothing for so long."""
        if name in self._watched:
            self._watched[name].busy_until = now + seconds

    def round_due(self, now: float) -> Iterable[str]:
        """The processes to ask now; none between two rounds."""
        if now < self._next_ping:
            return ()
        late_s = now - self._next_ping if self._next_ping else 0.0
        if late_s > self._interval_s:  # this process was stopped itself: answers have waited unread
            self._amnesty_until = now + self._config.hang_timeout_s  # others may have been stopped as well
            for watched in self._watched.values():
                watched.heard = min(now, watched.heard + late_s)  # an answer may have been read just now
                if watched.busy_until > self._next_ping:
                    watched.busy_until += late_s
                if watched.ends is not None:
                    watched.ends += late_s
        self._next_ping = now + self._interval_s
        return [name for name, watched in self._watched.items() if watched.is_ready]

    def timeout_s(self, now: float) -> float:
        """Until the next round."""
        return max(0.0, self._next_ping - now)

    def suspects(self, now: float) -> dict[str, str]:
        """The processes that may hang, each with what is known of it."""
        return {
            name: self._text(name, watched, now)
            for name, watched in self._watched.items()
            if watched.is_ready and self._silence_s(watched, now) > self._suspect_s
        }

    def hung(self, now: float) -> dict[str, str]:
        """The processes to kill, each with the reason."""
        config = self._config
        hung: dict[str, str] = {}
        for name, watched in self._watched.items():
            if watched.ends is not None:
                if now - watched.ends > self._exit_s:
                    hung[name] = f"{name} has failed and has not ended for {now - watched.ends:.0f} s"
            elif not watched.is_ready:
                if now - watched.heard > config.start_timeout_s:
                    hung[name] = f"{name} was not ready within supervisor.start_timeout_s ({config.start_timeout_s:g})"
            elif self._silence_s(watched, now) > config.hang_timeout_s:
                hung[name] = f"{self._text(name, watched, now)} (supervisor.hang_timeout_s {config.hang_timeout_s:g})"
        return hung

    def _silence_s(self, watched: _Watched, now: float) -> float:
        silence_s = 0.0 if now < watched.busy_until else now - max(watched.heard, watched.busy_until)
        return silence_s if now < self._amnesty_until else max(silence_s, watched.stalled_s)

    @staticmethod
    def _text(name: str, watched: _Watched, now: float) -> str:
        if watched.stalled_s > now - watched.heard:
            return f"{name} has made no progress for {watched.stalled_s:.0f} s"
        return f"{name} has answered nothing for {now - watched.heard:.0f} s"
