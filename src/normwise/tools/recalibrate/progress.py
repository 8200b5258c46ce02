"""A bar on standard error with the time left, where that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Show", "progress_bar"]

Show = Callable[[str, int, int], None]
"""``show(what, done, of)``; ``of`` is 0 where it is not known."""


def _nothing(what: str, done: int, of: int) -> None:
    pass


@contextmanager
def progress_bar(wanted: bool) -> Iterator[Show]:
    """Yields ``show``, which does nothing where no bar is wanted or nobody would see one."""
    # isatty: FORCE_COLOR makes rich take a log file for a terminal.
    if not (wanted and sys.stderr is not None and sys.stderr.isatty()):
        yield _nothing
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("batches, time left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task("recalibrate", total=None)

        def show(what: str, done: int, of: int) -> None:
            if bar.tasks[0].description != what:
                bar.reset(task, description=what)
            bar.update(task, completed=done, total=of or None)

        yield show
