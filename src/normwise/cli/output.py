"""What a sub-command gives: text for people, JSON for programs, files."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from torch import nn

    from ..results import Report

__all__ = ["add_output", "console", "print_json", "save_state", "show", "trimmed"]


def console() -> Console:
    """Standard output: colours on a terminal alone, none under NO_COLOR."""
    from rich.console import Console

    # isatty: FORCE_COLOR makes rich take a file for a terminal.
    seen = sys.stdout.isatty()
    return Console(no_color=None if seen else True, force_terminal=None if seen else False)


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

    json.dump(plain(value), sys.stdout, indent=2, allow_nan=False)
    print()


def add_output(parser: argparse.ArgumentParser, *, output: str | None = None) -> None:
    """``--json`` and ``--html``; ``-o`` where ``output`` says what it writes."""
    if output is not None:
        parser.add_argument("-o", "--output", metavar="FILE", help=output)
    parser.add_argument("--html", metavar="FILE", help="also write the report as one HTML page")
    parser.add_argument("--json", action="store_true", help="print JSON, nothing else")


def show(report: Report, arguments: argparse.Namespace, **more: Any) -> None:
    """The report as the arguments want it; ``more`` are further keys of the JSON."""
    if arguments.html is not None:
        report.save_html(arguments.html)
    if arguments.json:
        print_json({**report.to_dict(), **more})
    else:
        print(report)


def save_state(model: nn.Module, path: str) -> None:
    """The model's state dict: safetensors by that name, torch.save's format by any other.

    Raises:
        MissingDependencyError: without safetensors.
        OutputError: if the file cannot be written; what was there stays.
    """
    import torch

    from ..files import write_atomically

    state = model.state_dict()
    if Path(path).suffix == ".safetensors":
        from ..graph.saving import package

        library = package("safetensors.torch")
        # Copies: safetensors refuses tensors that share memory.
        own = {name: t.detach().cpu().contiguous().clone() for name, t in state.items()}
        data = library.save(own, {"format": "pt"})
        write_atomically(path, lambda file: file.write(data))
    else:
        write_atomically(path, lambda file: torch.save(state, file))
