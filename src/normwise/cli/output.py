"""What goes to standard output: text for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["console", "print_json", "trimmed"]


def console() -> Console:
    """Standard output: colours on a terminal alone, none under NO_COLOR."""
    from rich.console import Console

    # isatty: FORCE_COLOR makes rich take a file for a terminal.
    return Console(no_color=None if sys.stdout.isatty() else True, force_terminal=_terminal())


def _terminal() -> bool | None:
    return None if sys.stdout.isatty() else False


def trimmed(screen: Console, what: RenderableType) -> None:
    """Prints ``what``; off a terminal without the blanks that rich fills lines with."""
    if screen.is_terminal:
        screen.print(what)
        return
    with screen.capture() as capture:
        screen.print(what)
    screen.file.write("\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n")


def print_json(value: Any) -> None:
    """``value`` as JSON and nothing else; numbers that are not finite as null."""
    from ..results import plain

    json.dump(plain(value), sys.stdout, indent=2, allow_nan=False, ensure_ascii=False)
    print()
