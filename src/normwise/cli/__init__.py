"""The command line: ``normwise <sub-command>``. Each sub-command is one file beside this one.

Exit codes: 0 fine, 1 findings or failed verification, 2 wrong usage or unreadable input or output,
130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..errors import NormwiseError
from . import demo, explain

__all__ = ["main"]

SUBCOMMANDS = (demo, explain)
"""Modules with ``register(subparsers)``, which sets ``run(arguments) -> exit code`` as default."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="normwise",
        description="Batch normalization done right, for people who train and ship PyTorch models.",
    )
    subparsers = parser.add_subparsers(
        title="sub-commands", metavar="<sub-command>", dest="subcommand", required=True
    )
    for subcommand in SUBCOMMANDS:
        subcommand.register(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` (the process's own if None) and returns its exit code."""
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as exit_:  # argparse has printed help or the error already
        return exit_.code if isinstance(exit_.code, int) else 2
    try:
        code: int = arguments.run(arguments)
        return code
    except NormwiseError as error:
        print(f"normwise {arguments.subcommand}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"normwise {arguments.subcommand}: interrupted", file=sys.stderr)
        return 130
