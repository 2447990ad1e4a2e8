"""One progress bar on the terminal, or none. Loads rich only if it is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(description: str, total: int, *, shown: bool) -> Iterator[Callable[[], None]]:
    """Yields a function that advances the bar by one."""
    if not shown:
        yield lambda: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    cropped = Column(no_wrap=True, overflow="crop")  # an ellipsis is not in every terminal's encoding
    columns = (
        TextColumn("{task.description}", table_column=cropped),
        BarColumn(),
        *(kind(table_column=cropped) for kind in (MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn)),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)
