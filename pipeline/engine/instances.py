"""The processes and rings of one engine: what the rows of its table stand for. Has no effects."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.engine.role_settings import EngineFacts
from pipeline.engine.topology import LAUNCHER, RingRow, Role, SocketRow, Table


@dataclass(frozen=True)
class Process:
    """One process of a role."""

    name: str  # "gateway", "tokenizer.0", ...
    role: Role
    index: int


@dataclass(frozen=True)
class RingInstance:
    """One ring in memory, and the processes that have a part in it."""

    name: str  # "step", "prompt.0", ...
    index: int  # among the rings of one name in the table
    row: RingRow
    writer: str
    owner: str  # of the read cursor
    readers: tuple[str, ...]

    @property
    def parts(self) -> set[str]:
        """The names of all processes that have a part in it."""
        return {self.writer, self.owner, *self.readers}


class Instances:
    """All processes and rings of one engine. Raises ValueError for a table that names a role that it does not have."""

    def __init__(self, table: Table, facts: EngineFacts) -> None:
        self._table = table
        self._by_role = {role.name: _processes(role, facts) for role in table.roles}
        self.processes = tuple(process for role in table.roles for process in self._by_role[role.name])
        self.rings = tuple(
            ring for name in dict.fromkeys(row.name for row in table.rings) for ring in self._rings(name)
        )

    def process(self, name: str) -> Process:
        """The process of this name."""
        return next(process for process in self.processes if process.name == name)

    def names(self, roles: Iterable[str]) -> tuple[str, ...]:
        """The names of all processes of these roles. The launcher is none of them."""
        return tuple(process.name for role in roles for process in self._of_role(role))

    def connecting(self, row: SocketRow) -> tuple[str, ...]:
        """The roles that connect to a socket."""
        return tuple(self._by_role) if row.connected_by is None else row.connected_by

    def _rings(self, name: str) -> list[RingInstance]:
        """All rings of one name in the table; numbered if there are several."""
        rings: list[tuple[RingRow, str | None]] = []  # with the process of `one_per` that it belongs to
        for row in self._table.rings:
            if row.name == name:
                rings += [
                    (row, process) for process in ((None,) if row.one_per is None else self.names((row.one_per,)))
                ]

        def part(row: RingRow, role: str, of: str | None) -> tuple[str, ...]:
            return (of,) if of is not None and role == row.one_per else self.names((role,))

        return [
            RingInstance(
                name=name if len(rings) == 1 else f"{name}.{index}",
                index=index,
                row=row,
                writer=part(row, row.written_by, of)[0],
                owner=part(row, row.released_by, of)[0],
                readers=tuple(process for role in row.read_by for process in part(row, role, of)),
            )
            for index, (row, of) in enumerate(rings)
        ]

    def _of_role(self, role: str) -> tuple[Process, ...]:
        if role == LAUNCHER:
            return ()
        if role not in self._by_role:
            raise ValueError(f"the table has no role {role!r}; it has {', '.join(self._by_role)}")
        return self._by_role[role]


def _processes(role: Role, facts: EngineFacts) -> tuple[Process, ...]:
    count = 1 if role.count is None else role.count(facts.config)
    return tuple(
        Process(f"{role.name}.{index}" if index or role.is_numbered else role.name, role, index)
        for index in range(count)
    )
