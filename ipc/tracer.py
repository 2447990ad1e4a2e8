"""The hooks by which a thread traces what it does: `with trace[Span.PLAN] as span: ...; span.set(ticket)`.

A plain `Tracer` records nothing and costs next to nothing. A `RingTracer` writes to a ring of `ipc/trace.py`. A tracer
belongs to one thread and is the list of its spans by kind. It reuses one object for all spans of a kind, so spans of
the same kind must not nest.
"""

from __future__ import annotations

from time import monotonic_ns
from typing import Final, Self

from ipc.trace import KINDS, TraceHandle, TraceRing


class OpenSpan:
    """Some work, from entry to exit. This class does not record it."""

    __slots__ = ()

    def set(self, first: int, second: int = 0, third: int = 0) -> None:
        """The span's values, named in `ipc.trace.KINDS`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        pass


class Tracer(list[OpenSpan]):
    """Traces nothing."""

    is_on = False

    def __init__(self) -> None:
        super().__init__([OpenSpan()] * len(KINDS))

    def record(
        self, kind: int, start_ns: int, duration_ns: int, first: int = 0, second: int = 0, third: int = 0
    ) -> None:
        """Record work whose times were measured elsewhere."""

    def gauge(self, kind: int, first: int, second: int = 0, third: int = 0) -> None:
        """Record the present values of a counter if they have changed."""


NO_TRACE: Final = Tracer()


class RingTracer(Tracer):
    """Writes to a ring."""

    is_on = True

    def __init__(self, ring: TraceRing) -> None:
        super().__init__()
        self._ring = ring
        self._gauged: dict[int, tuple[int, int, int]] = {}
        self[:] = [_RecordedSpan(ring, kind) for kind in range(len(KINDS))]

    def record(
        self, kind: int, start_ns: int, duration_ns: int, first: int = 0, second: int = 0, third: int = 0
    ) -> None:
        self._ring.write(kind, start_ns, duration_ns, first, second, third)

    def gauge(self, kind: int, first: int, second: int = 0, third: int = 0) -> None:
        values = (first, second, third)
        if self._gauged.get(kind) != values:
            self._gauged[kind] = values
            self._ring.write(kind, monotonic_ns(), 0, *values)


class _RecordedSpan(OpenSpan):
    __slots__ = ("_first", "_kind", "_second", "_since_ns", "_third", "_write")

    def __init__(self, ring: TraceRing, kind: int) -> None:
        self._write = ring.write
        self._kind = kind

    def set(self, first: int, second: int = 0, third: int = 0) -> None:
        self._first, self._second, self._third = first, second, third

    def __enter__(self) -> Self:
        self._first = self._second = self._third = 0
        self._since_ns = monotonic_ns()
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        since_ns = self._since_ns
        self._write(self._kind, since_ns, monotonic_ns() - since_ns, self._first, self._second, self._third)


def tracer(handle: TraceHandle | None) -> Tracer:
    """A tracer for this ring, or one that traces nothing."""
    return NO_TRACE if handle is None else RingTracer(TraceRing(handle))
