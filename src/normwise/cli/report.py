"""``normwise report``: one page of what other sub-commands found."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..errors import InputError, message
from .output import print_json

if TYPE_CHECKING:
    from argparse import _SubParsersAction

__all__ = ["register"]


def register(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``report`` to the command line."""
    parser = subparsers.add_parser(
        "report",
        help="one HTML page of what check, fold, recalibrate, … wrote with --json",
        description="Puts results of other sub-commands, written with --json, on one page: "
        "self-contained, interactive, for reading without a network.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""\
examples:
  normwise report check.json fold.json -o model.html
where
  normwise check model.safetensors --json > check.json
  normwise fold --model net:build --input 1x3x32x32 --json > fold.json

Exit codes: 0 fine, 2 wrong usage, a file that is no result, a page that cannot be written.""",
    )
    parser.add_argument("results", nargs="+", metavar="FILE", help="results as JSON")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the page")
    parser.add_argument("--title", metavar="TEXT", help="of the page")
    parser.add_argument("--json", action="store_true", help="print JSON, nothing else")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Reads, composes, writes, and returns the exit code."""
    from ..report import load, save

    if arguments.output in arguments.results:
        raise InputError(
            message(
                "the page is another file than the results", repr(arguments.output), "-o page.html"
            )
        )
    results = [shown for path in arguments.results for shown in load(path)]
    save(arguments.output, *results, title=arguments.title)
    if arguments.json:
        print_json({"output": arguments.output, "results": len(results)})
    else:
        print(arguments.output)
    return 0
