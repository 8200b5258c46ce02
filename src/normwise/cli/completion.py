"""``normwise --print-completion SHELL``: what makes a shell complete sub-commands and options."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import MissingDependencyError, message

__all__ = ["add_option"]

SHELLS = ("bash", "zsh", "tcsh")


class _Print(argparse.Action):
    """Prints the script and exits, as ``--help`` does, before sub-commands are asked for."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        try:
            import shtab
        except ImportError as error:
            raise MissingDependencyError(
                message(
                    "completion scripts are written by shtab",
                    f"a Python that cannot import it ({error})",
                    'pip install "normwise[cli]"',
                )
            ) from error
        _complete_files(parser, {"FILE": shtab.FILE, "PATH": shtab.FILE, "DIR": shtab.DIRECTORY})
        print(shtab.complete(parser, shell=str(values)))
        parser.exit(0)


def _complete_files(parser: argparse.ArgumentParser, by_metavar: Mapping[str, object]) -> None:
    """Arguments that are shown as FILE or DIR are completed as such, in sub-commands too."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                _complete_files(sub, by_metavar)
        elif action.metavar in by_metavar:
            action.complete = by_metavar[str(action.metavar)]  # type: ignore[attr-defined] # shtab's


def add_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--print-completion``."""
    parser.add_argument(
        "--print-completion",
        action=_Print,
        choices=SHELLS,
        metavar="SHELL",
        help="print the completion script for bash, zsh or tcsh and exit "
        '(bash: eval "$(normwise --print-completion bash)")',
    )
