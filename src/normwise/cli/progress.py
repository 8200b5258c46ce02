"""What long work shows on standard error, if that is a terminal: a bar or a spinner."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

__all__ = ["bar", "busy"]


def _watched() -> bool:
    """isatty: FORCE_COLOR makes rich take a log file for a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


@contextmanager
def bar(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Yields ``show(done, of)``, which moves a bar with the time left, or does nothing."""
    if not _watched():
        yield lambda done, of: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    # No refreshing thread: it would run in the middle of what is timed.
    progress = Progress(
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{unit}, time left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        auto_refresh=False,
        transient=True,
    )
    with progress:
        task = progress.add_task(what, total=None, visible=False)

        def show(done: int, of: int) -> None:
            progress.update(task, completed=done, total=of, visible=True, refresh=True)

        yield show


def busy(what: str) -> AbstractContextManager[Any]:
    """A spinner beside ``what``, for work of which nobody knows how long it takes."""
    if not _watched():
        return nullcontext()
    from rich.console import Console

    return Console(stderr=True).status(what)
