"""Kills (SIGKILL) and stops (SIGSTOP) processes of a running engine at random moments."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

_LOOK_S: Final = 0.02
_AT_ONCE: Final = 0.15  # share of the kills that hit a second process at the same moment
_AT_START: Final = 0.2  # share of the kills that are followed by one of the process that starts in its place
_LONGEST_START_S: Final = 3.0


@dataclass
class Fault:
    """One process that was killed or stopped, and the time from then to the next part of each open stream."""

    process: str
    how: Literal["kill", "hang"]
    at: float  # CLOCK_MONOTONIC, seconds
    pauses_s: list[float] = field(default_factory=list)

    @property
    def role(self) -> str:
        return self.process.partition(".")[0]


class Faults:
    """Makes faults and remembers them.

    `pids` gives the present processes by name; "launcher" is left alone. `seed` fixes what is hit, and when, but not
    what the engine does at that moment. `roles`: those that are hit; () = all. Each role is hit equally often.
    """

    def __init__(self, pids: Callable[[], Mapping[str, int]], seed: int, roles: Sequence[str] = ()) -> None:
        self.done: list[Fault] = []
        self._pids = pids
        self._roles = roles
        self._random = random.Random(seed)
        self._hit: set[int] = set()  # processes that end or are to be killed by the launcher

    def choose(self) -> str | None:
        """A process to hit. None: all of them have been hit and are not replaced yet."""
        by_role: dict[str, list[str]] = {}
        for name, pid in sorted(self._pids().items()):
            role = name.partition(".")[0]
            if role != "launcher" and pid not in self._hit and (not self._roles or role in self._roles):
                by_role.setdefault(role, []).append(name)
        return self._random.choice(by_role[self._random.choice(list(by_role))]) if by_role else None

    def hit(self, name: str, how: Literal["kill", "hang"] = "kill") -> int:
        """Kill or stop this process now. Returns its pid; 0 = it has just ended by itself."""
        pid = self._pids()[name]
        try:
            os.kill(pid, signal.SIGKILL if how == "kill" else signal.SIGSTOP)
        except ProcessLookupError:
            return 0
        self._hit.add(pid)
        self.done.append(Fault(name, how, time.monotonic()))
        return pid

    async def kill(self, count: int, mean_s: float, *, is_regular: bool = False) -> None:
        """Kill `count` processes, on average one every `mean_s` seconds, some of them together or as they start.

        `is_regular`: exactly every `mean_s` seconds, and `count` times, whatever dies together.
        """
        num_before, num_rounds, draw = len(self.done), 0, self._random
        while (left := count - (num_rounds if is_regular else len(self.done) - num_before)) > 0:
            await asyncio.sleep(mean_s if is_regular else draw.expovariate(1 / mean_s))
            num_rounds += 1
            if (name := self.choose()) is None:
                continue
            pid = self.hit(name)
            if left > 1 and draw.random() < _AT_ONCE and (other := self.choose()) is not None:
                self.hit(other)
            elif left > 1 and pid and draw.random() < _AT_START and await self.replaced(name, pid, _LONGEST_START_S):
                await asyncio.sleep(draw.random() * _LONGEST_START_S)
                self.hit(name)

    async def hang(self, count: int, timeout_s: float, serves: Callable[[], Awaitable[bool]]) -> None:
        """Stop `count` processes, one after the other, each while the engine `serves()`.

        A process that starts may take longer than `timeout_s`, and so may the first step of a GPU process on the CPU,
        so none is stopped then. Raises TimeoutError if the launcher does not replace a process within `timeout_s`
        seconds.
        """
        for _ in range(count):
            while not await serves():
                await asyncio.sleep(_LOOK_S)
            await asyncio.sleep(1 + self._random.random())
            while (name := self.choose()) is None:
                await asyncio.sleep(_LOOK_S)
            if (pid := self.hit(name, "hang")) and not await self.replaced(name, pid, timeout_s):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                raise TimeoutError(f"{name} was stopped, and was not replaced within {timeout_s:g} s")

    async def replaced(self, name: str, pid: int, timeout_s: float) -> bool:
        """Wait until another process has this name."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._pids()[name] == pid:
                    await asyncio.sleep(_LOOK_S)
                return True
        return False
