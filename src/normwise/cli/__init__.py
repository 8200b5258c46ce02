"""The command line: ``normwise <sub-command>``. Each sub-command is one file beside this one.

Exit codes: 0 fine, 1 findings or failed verification, 2 wrong usage or unreadable input or output,
130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ..errors import NormwiseError
from . import bench, check, completion, convert, demo, explain, fold, recalibrate, report

__all__ = ["main"]

SUBCOMMANDS = (demo, explain, check, recalibrate, fold, convert, report, bench)
"""Modules with ``register(subparsers)``, which sets ``run(arguments) -> exit code`` as default."""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="normwise",
        description="Batch normalization done right, for people who train and ship PyTorch models.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""\
examples:
  normwise demo --quick
  normwise explain momentum
  normwise check model.safetensors
  normwise fold --model net:build --input 1x3x224x224 -o folded.safetensors

normwise <sub-command> --help has more.
Exit codes: 0 fine, 1 findings or a verification that failed, 2 wrong usage, unreadable input,
output that cannot be written, a missing package.""",
    )
    completion.add_option(top)
    subparsers = top.add_subparsers(
        title="sub-commands", metavar="<sub-command>", dest="subcommand", required=True
    )
    for subcommand in SUBCOMMANDS:
        subcommand.register(subparsers)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` (the process's own if None) and returns its exit code."""
    name = "normwise"
    try:
        arguments = parser().parse_args(argv)
        name = f"normwise {arguments.subcommand}"
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except SystemExit as exit_:  # argparse has printed help or the error already
        return exit_.code if isinstance(exit_.code, int) else 2
    except NormwiseError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Who read the output has enough (`normwise explain momentum | head`). What is left in the
        # buffer goes nowhere, or the interpreter would complain when it flushes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
