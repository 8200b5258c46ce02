"""``normwise recalibrate``: running statistics become those of the data."""

from __future__ import annotations

import argparse
import warnings
from typing import TYPE_CHECKING

from .inputs import add_data, add_model, data_of, model_of
from .output import add_output, save_state, show

if TYPE_CHECKING:
    from argparse import _SubParsersAction

__all__ = ["register"]


def register(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``recalibrate`` to the command line."""
    parser = subparsers.add_parser(
        "recalibrate",
        help="replace running statistics by those of data, exactly",
        description="Runs data through a model and replaces the running statistics of its batch "
        "norms by those of the data, exactly and checked. Parameters stay as they are.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""\
examples:
  normwise recalibrate --model net:build --weights net.pt --data net:batches -o new.pt
  normwise recalibrate --model net:build --weights net.pt --data net:batches --batches 100 \\
      --mode batch --html report.html

Exit codes: 0 fine, 1 the check afterwards does not hold, 2 wrong usage, a model or data that
cannot be had or run, a file that cannot be written.""",
    )
    add_model(parser)
    add_data(parser, required=True)
    parser.add_argument(
        "--mode",
        choices=("exact", "batch"),
        default="exact",
        help="exact: several passes, self-consistent (default); batch: one pass",
    )
    parser.add_argument(
        "--blend",
        type=float,
        metavar="B",
        help="the weight of the data against the old statistics, from 0 to 1 (default: 1)",
    )
    parser.add_argument(
        "--layers",
        action="append",
        metavar="NAME",
        help="only the norms of this name or pattern ('stem.*'); again for more",
    )
    add_output(parser, output="the state dict: .safetensors, or any other name for torch.save's")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Recalibrates, writes, prints, and returns the exit code."""
    from ..tools.recalibrate import recalibrate

    model, data = model_of(arguments), data_of(arguments.data)
    with warnings.catch_warnings():
        # The report and the exit code say the same.
        warnings.filterwarnings("ignore", "after recalibration outputs follow", UserWarning)
        model, report = recalibrate(
            model,
            data,
            batches=arguments.batches,
            mode=arguments.mode,
            blend=arguments.blend,
            layers=arguments.layers,
            inplace=True,
        )
    if arguments.output is not None:
        save_state(model, arguments.output)
    show(report, arguments, output=arguments.output)
    return 1 if report.facts["self_consistent"] is False else 0
