"""``normwise demo``: batch norm at work on handwritten digits, checked against torch.nn's."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from ..errors import message
from .output import console, print_json
from .progress import bar

if TYPE_CHECKING:
    from argparse import _SubParsersAction

__all__ = ["register"]


def _seed(text: str) -> int:
    try:
        seed = int(text)
    except ValueError:
        seed = -1
    if seed < 0:
        raise argparse.ArgumentTypeError(
            f"the seed must be an integer >= 0; got {text!r}. Try: --seed 0"
        )
    return seed


def register(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``demo`` to the command line."""
    parser = subparsers.add_parser(
        "demo",
        help="train on handwritten digits without batch norm, with torch.nn's and with normwise's",
        description="Trains the network of the batch norm paper's figure 1 on 1,797 handwritten "
        "digits three times: without batch norm, with torch.nn's and with normwise's. Prints how "
        "they fared, checks that the two batch norms agree, and draws the figure. With --html the "
        "trained network is checked, recalibrated and folded too, and all of it is on one page.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""\
examples:
  normwise demo
  normwise demo --quick --html page.html
  normwise demo --seed 3 --json > demo.json

Exit codes: 0 fine, 1 the two batch norms disagree (or, with --html, the trained network has
findings), 2 wrong usage, a missing package or an output that cannot be written to.""",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a sixth of the steps: a few seconds in all"
    )
    parser.add_argument(
        "--seed",
        type=_seed,
        default=0,
        metavar="N",
        help="of the split, the weights and the order of the batches (default: 0)",
    )
    parser.add_argument(
        "--out",
        default="normwise-demo",
        metavar="DIR",
        help="where the picture goes (default: ./normwise-demo)",
    )
    parser.add_argument(
        "--html",
        metavar="FILE",
        help="also check, recalibrate and fold the network, and write one page of everything",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON, nothing else"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the demo, prints it, and returns the exit code."""
    from ..demo import require, run

    require("sklearn", "matplotlib")
    from ..demo.summary import print_summary

    with bar("training", "steps") as progress:
        result = run(
            arguments.quick, arguments.seed, arguments.out, page=arguments.html, progress=progress
        )
    if arguments.json:
        print_json(result.to_dict())
    else:
        print_summary(result, console())
    if result.passed:
        return 0 if result.aftercare is None or result.aftercare.passed else 1
    print(
        "normwise demo: "
        + message(
            "the two batch norms must train alike, their losses within "
            f"{result.agreement.tolerance:.0e} of each other for "
            f"{result.agreement.verified_steps} steps",
            f"training losses {result.agreement.verified_training_loss.largest:.1e} and test "
            f"losses {result.agreement.verified_test_loss.largest:.1e} apart",
            "running the tests, and reporting this with the output of normwise demo --json",
        ),
        file=sys.stderr,
    )
    return 1
