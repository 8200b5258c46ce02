"""``normwise bench``: normwise's norms against torch.nn's on this machine."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .inputs import shape, whole_number
from .output import add_output, show
from .progress import bar

if TYPE_CHECKING:
    from argparse import _SubParsersAction

__all__ = ["register"]

NORMS = ("batch", "layer", "group", "instance", "rms")
"""Written out, as the tool is loaded when it runs. A test holds them to its own."""


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 3600:
        raise argparse.ArgumentTypeError(
            f"it must be a number of seconds above 0; got {text!r}. Try: --seconds 1"
        )
    return seconds


def register(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``bench`` to the command line."""
    parser = subparsers.add_parser(
        "bench",
        help="time normwise's norms against torch.nn's on this machine",
        description="Times normwise's norms and torch.nn's in turn, on the same tensors, after "
        "seeing that they agree: training forward, forward and backward, eval. Medians and ratios; "
        "a ratio above 1 means that normwise is faster.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""\
examples:
  normwise bench
  normwise bench --shape 32x64x56x56 --shape 32x512x7x7 --channels-last
  normwise bench --norm layer --shape 32x128x768 --dtype bfloat16 --json

For the tables of the repository, with the floor that memory sets: make bench.

Exit codes: 0 fine, 1 the two disagree, 2 wrong usage.""",
    )
    parser.add_argument(
        "--shape",
        dest="shapes",
        action="append",
        type=shape,
        metavar="NxCx…",
        help="of the input; again for more (default: three of ResNet-50)",
    )
    parser.add_argument("--norm", choices=NORMS, default="batch", help="(default: batch)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32"
    )
    parser.add_argument(
        "--channels-last", action="store_true", help="memory in the order N, H, W, C"
    )
    parser.add_argument(
        "--seconds",
        type=_seconds,
        default=1.0,
        metavar="S",
        help="for each shape and pass (default: 1)",
    )
    parser.add_argument(
        "--threads", type=whole_number, metavar="N", help="torch's number of threads"
    )
    add_output(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints, and returns the exit code."""
    from ..tools.bench import SHAPES, bench

    with bar("measuring", "passes") as progress:
        report = bench(
            arguments.shapes or SHAPES,
            norm=arguments.norm,
            dtype=arguments.dtype,
            channels_last=arguments.channels_last,
            seconds=arguments.seconds,
            threads=arguments.threads,
            progress=progress,
        )
    show(report, arguments)
    return 0 if report.passed else 1
