"""Asks the kernel which Unix sockets are connected."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Final

_SS_CONNECTED: Final = "03"  # in /proc/net/unix


def connections_stand(expected: dict[Path, int]) -> bool:
    """Whether each of these sockets has at least its expected number of connections, by the kernel's own table."""
    connected: Counter[str] = Counter()
    try:
        lines = Path("/proc/net/unix").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    for line in lines:
        columns = line.split(None, 7)  # Num RefCount Protocol Flags Type St Inode Path
        if len(columns) == 8 and columns[5] == _SS_CONNECTED:
            connected[columns[7]] += 1
    return all(connected[str(path)] >= count for path, count in expected.items())
