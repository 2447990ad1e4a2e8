"""A progress bar on the terminal. Loads rich only if the bar is shown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast


@contextmanager
def progress_bar(description: str, total: int, *, shown: bool) -> Iterator[Callable[[], None]]:
    """Show a bar of `total` units if `shown`. Yields a function that advances it by one unit."""
    if not shown:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    cropped = Column(no_wrap=True, overflow="crop")  # not every terminal's encoding has an ellipsis
    columns = (
        TextColumn("{task.description}", table_column=cropped),
        BarColumn(),
        *(kind(table_column=cropped) for kind in (MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn)),
    )
    with Progress(*columns, console=Console(file=forgiving(sys.stdout))) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)


def forgiving(stream: TextIO | None) -> TextIO | None:
    """The stream, ignoring errors of writing: work must not fail because its progress bar cannot be shown."""
    return None if stream is None else cast(TextIO, _Forgiving(stream))


class _Forgiving:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # full, without a reader, or closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()
