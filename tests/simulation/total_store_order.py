"""Explores every interleaving of a few processes that share memory under total store order, and every death among them.

Knows nothing of rings. A process is a function from one of its resting states to the next; in between it calls
`Process.load`, `store`, ... Every such call is one step of the exploration. Real code runs inside such functions. For
each step it starts again from its resting state. A log answers the calls made so far, and the first new call stops it.
So a process's state is (resting state, log), it can be hashed, and no state is explored twice.

The memory model is x86's, total store order (Sewell et al., 2010). Each process's stores pass through a first-in
first-out buffer that drains at any time. A process reads its own buffered stores. Kernel calls drain the buffer first.
A killed process's buffer still drains before its successor starts.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

DEAD = "dead"
DONE = "done"


class Violation(Exception):
    """A reachable state breaks the protocol; the text ends with the steps that lead there."""


class _Pause(BaseException):
    """Stops a process at a call that the log does not answer. No `except Exception` of the code under test sees it."""


class Process:
    """The actions that the code of a process may take. Addresses are byte offsets, bells and channels are named by
    integers."""

    def __init__(self) -> None:
        self._log: tuple[Any, ...] = ()
        self._position = 0

    def restart(self, log: tuple[Any, ...]) -> None:
        self._log, self._position = log, 0

    def _call(self, *operation: Any) -> Any:
        if self._position == len(self._log):
            raise _Pause(operation)
        self._position += 1
        return self._log[self._position - 1]

    def load(self, address: int) -> int:
        return self._call("load", address)  # type: ignore[no-any-return]

    def store(self, address: int, value: int) -> None:
        self._call("store", address, value)

    def ring(self, bell: int) -> None:
        self._call("ring", bell)

    def drain(self, bell: int) -> bool:
        return self._call("drain", bell)  # type: ignore[no-any-return]

    def sleep(self, bell: int) -> None:
        """Go on only when the bell has been rung."""
        self._call("sleep", bell)

    def send(self, channel: int, value: int) -> None:
        self._call("send", channel, value)

    def receive(self, channel: int) -> int:
        """The channel's next value; waits for it."""
        return self._call("receive", channel)  # type: ignore[no-any-return]

    def deliver(self, item: int) -> None:
        """Tell the explorer that the item has reached its destination."""
        self._call("deliver", item)


class Actor(NamedTuple):
    """A process in some state. `log` answers its calls since `rest`; `buffer` holds (address, value) stores."""

    rest: Hashable
    log: tuple[Any, ...] = ()
    buffer: tuple[tuple[int, int], ...] = ()


class State(NamedTuple):
    memory: tuple[int, ...]
    bells: tuple[bool, ...]
    channels: tuple[tuple[int, ...], ...]
    actors: tuple[Actor, ...]
    num_delivered: int
    num_kills_left: int


@dataclass(frozen=True)
class Program:
    """A process: its name, where it starts, and what it does from one resting state to the next, DONE in the end."""

    name: str
    start: Hashable
    advance: Callable[[Process, Any], Hashable]
    can_die: bool = True


class Explorer:
    """Visits all states from one in which every program is at its start and `memory` ({address: value}) is given."""

    def __init__(self, programs: list[Program], memory: dict[int, int], *, num_items: int, num_kills: int = 0) -> None:
        self.programs = programs
        self.num_items = num_items
        self._places = {address: place for place, address in enumerate(sorted(memory))}
        actors = tuple(Actor(program.start) for program in programs)
        values = tuple(memory[address] for address in self._places)
        self._initial = State(values, (False,) * 4, ((),) * 4, actors, 0, num_kills)
        self._process = Process()
        self._next: dict[tuple[int, Hashable, tuple[Any, ...]], tuple[Any, Any]] = {}
        self._came_from: dict[State, tuple[State, str] | None] = {}

    def run(self) -> int:
        """Explore everything. Returns the number of states; raises Violation at the first bad one."""
        self._came_from = {self._initial: None}
        pending = [self._initial]
        while pending:
            state = pending.pop()
            is_final = True
            for label, successor, is_progress in self._successors(state):
                is_final = is_final and not is_progress
                if successor not in self._came_from:
                    self._came_from[successor] = (state, label)
                    pending.append(successor)
            if is_final and state.num_delivered != self.num_items:
                raise Violation(
                    f"everyone sleeps, {state.num_delivered} of {self.num_items} items arrived{self._trace(state)}"
                )
        return len(self._came_from)

    def _successors(self, state: State) -> list[tuple[str, State, bool]]:
        """(what happened, next state, False for a death) for each thing that can happen."""
        found = []
        for index, (program, actor) in enumerate(zip(self.programs, state.actors, strict=True)):
            if actor.buffer:
                (address, value), *rest = actor.buffer
                memory = _replaced(state.memory, self._places[address], value)
                flushed = self._with_actor(state, index, actor._replace(buffer=tuple(rest)))
                found.append((f"{program.name}: {value} reaches {address}", flushed._replace(memory=memory), True))
            if actor.rest == DONE:
                continue
            if actor.rest == DEAD:
                if not actor.buffer:
                    reborn = self._with_actor(state, index, Actor(program.start))
                    found.append((f"{program.name}: starts again", reborn, True))
                continue
            if program.can_die and state.num_kills_left:
                killed = self._with_actor(state, index, Actor(DEAD, (), actor.buffer))
                killed = killed._replace(num_kills_left=state.num_kills_left - 1)
                found.append((f"{program.name}: is killed", killed, False))
            rest, operation = self._next_operation(index, actor, state)
            if rest == DONE:
                found.append(
                    (f"{program.name}: ends", self._with_actor(state, index, Actor(DONE, (), actor.buffer)), True)
                )
            elif (performed := self._perform(state, index, actor, operation)) is not None:
                result, after = performed
                was = after.actors[index]
                after = self._with_actor(after, index, was._replace(rest=rest[0], log=(*rest[1], result)))
                found.append((f"{program.name}: {' '.join(map(str, operation))} -> {result}", after, True))
        return found

    def _next_operation(self, index: int, actor: Actor, state: State) -> tuple[Any, Any]:
        """((resting state, log), the operation that comes next there), or (DONE, None)."""
        key = (index, actor.rest, actor.log)
        if key not in self._next:
            rest, log = actor.rest, actor.log
            while True:
                self._process.restart(log)
                try:
                    rest, log = self.programs[index].advance(self._process, rest), ()
                except _Pause as pause:
                    self._next[key] = ((rest, log), pause.args[0])
                    break
                except Exception as error:
                    text = f"{self.programs[index].name}: {type(error).__name__}: {error}"
                    raise Violation(text + self._trace(state)) from error
                if rest == DONE:
                    self._next[key] = (DONE, None)
                    break
        return self._next[key]

    def _perform(self, state: State, index: int, actor: Actor, operation: Any) -> tuple[Any, State] | None:
        """(what the call returns, the state after it), or None if it has to wait."""
        kind, target, *value = operation
        if kind == "load":
            for address, buffered in reversed(actor.buffer):
                if address == target:
                    return buffered, state
            return state.memory[self._places[target]], state
        if kind == "store":
            if target not in self._places:
                raise Violation(
                    f"{self.programs[index].name} writes to {target}, which no process may{self._trace(state)}"
                )
            return 0, self._with_actor(state, index, actor._replace(buffer=(*actor.buffer, (target, value[0]))))
        if kind == "deliver":
            if target > state.num_delivered + 1:
                raise Violation(f"item {target} arrived after {state.num_delivered}{self._trace(state)}")
            return 0, state._replace(num_delivered=max(target, state.num_delivered))
        if actor.buffer:
            return None  # a kernel call: every store before it is visible first
        if kind == "ring":
            return 0, state._replace(bells=_replaced(state.bells, target, True))
        if kind == "drain":
            return state.bells[target], state._replace(bells=_replaced(state.bells, target, False))
        if kind == "sleep":
            return (0, state) if state.bells[target] else None
        if kind == "send":
            channel = (*state.channels[target], value[0])
            return 0, state._replace(channels=_replaced(state.channels, target, channel))
        assert kind == "receive", f"no operation {kind}"
        if not state.channels[target]:
            return None
        first, *others = state.channels[target]
        return first, state._replace(channels=_replaced(state.channels, target, tuple(others)))

    def _with_actor(self, state: State, index: int, actor: Actor) -> State:
        return state._replace(actors=_replaced(state.actors, index, actor))

    def _trace(self, state: State) -> str:
        steps = []
        while (origin := self._came_from[state]) is not None:
            state, label = origin
            steps.append(label)
        return "\n  " + "\n  ".join(reversed(steps))


def _replaced(values: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return (*values[:index], value, *values[index + 1 :])
