"""One page of several results."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

from normwise.errors import InputError, message
from normwise.pages import Page, Section
from normwise.results import Result

__all__ = ["Shown", "compose", "save"]


class Shown(Protocol):
    """Whatever says what stands on its page: a report, or the demo's result."""

    def sections(self) -> Sequence[Section]: ...


def compose(*results: Shown | Result[Any, Any], title: str | None = None) -> Page:
    """The page of ``results``, one under the other, with links to each.

    Args:
        results: what fold, recalibrate, convert and equalize gave back, or its ``.report``; what
            check, watch, quantization_report and the demo gave back; what :func:`load` read.
        title: of the page.

    Returns:
        normwise.pages.Page: ``page.save(path)`` writes it, ``page.html()`` is its text.

    Raises:
        InputError: without results, or with something that has no page.
    """
    sections: list[Section] = []
    for result in results:
        report = result.report if isinstance(result, Result) else result
        made = getattr(report, "sections", None)
        if made is None:
            raise InputError(
                message(
                    "a page is made of results and reports",
                    f"an object of class {type(result).__name__}",
                    "what nw.check, nw.fold, nw.recalibrate, … gave back",
                )
            )
        sections += made()
    if not sections:
        raise InputError(message("a page shows results", "none", "save(path, result)"))
    return Page(title or f"normwise {' · '.join(s.title for s in sections)}", sections)


def save(
    path: str | os.PathLike[str], *results: Shown | Result[Any, Any], title: str | None = None
) -> None:
    """Write :func:`compose` 's page to ``path``, in one piece.

    Raises:
        InputError: as in :func:`compose`.
        OutputError: if ``path`` cannot be written to.
    """
    compose(*results, title=title).save(path)
