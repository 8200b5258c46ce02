"""``normwise convert``: one kind of norm into another."""

from __future__ import annotations

import argparse
from ast import literal_eval
from typing import TYPE_CHECKING, Any

from .inputs import add_input, add_model, inputs_of, model_of
from .output import add_output, save_state, show
from .progress import busy

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from torch import nn

__all__ = ["register"]

KINDS = ("normwise", "torch", "sync", "ghost", "renorm", "frozen", "group", "instance")
"""Written out: the tools are loaded when they run. A test holds them to convert's own."""


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name.isidentifier() or not equals:
        raise argparse.ArgumentTypeError(
            f"an option is NAME=VALUE; got {text!r}. Try: num_groups=8"
        )
    try:
        return name, literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def register(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``convert`` to the command line."""
    parser = subparsers.add_parser(
        "convert",
        help="turn one kind of norm into another, with what it learned",
        description="Turns every norm of a model into another kind, with its parameters and "
        "statistics. The report says what each became, or why it stayed; with --input the outputs "
        "before and after are compared in eval mode.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""\
examples:
  normwise convert --model net:build --to normwise --input 1x3x32x32
  normwise convert --model net:build --weights net.pt --to group --option num_groups=8 -o group.pt
  normwise convert --model net:build --to sync --json

The file of -o is a state dict; it is loaded with
  nw.convert(build(), "group", num_groups=8).model.load_state_dict(torch.load("group.pt"))

Exit codes: 0 fine, 1 outputs differ where no conversion should have changed them, 2 wrong usage,
a model that cannot be built or run, a file that cannot be written.""",
    )
    add_model(parser)
    parser.add_argument("--to", required=True, choices=KINDS, help="what the norms become")
    parser.add_argument(
        "--option",
        dest="options",
        type=_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the new class, such as num_groups=8 or ghost_size=16; again for more",
    )
    add_input(parser)
    add_output(parser, output="the state dict: .safetensors, or any other name for torch.save's")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Converts, compares, writes, prints, and returns the exit code."""
    from ..tools.convert import convert

    model = model_of(arguments)
    with busy("converting"):
        model, report = convert(
            model, arguments.to, inputs_of(arguments), **dict(arguments.options)
        )
    if arguments.output is not None:
        save_state(model, arguments.output)
    show(report, arguments, output=arguments.output)
    difference = report.facts.get("difference")
    same = all(e.facts.get("preserved", True) for e in report)
    # Not >: a difference that is no number is one.
    return 1 if same and difference is not None and not difference <= _rounding(model) else 0


def _rounding(model: nn.Module) -> float:
    """Half of the digits of the model's coarsest dtype: two right norms sum in different orders,
    and the layers behind them carry that on."""
    import torch

    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return max((float(torch.finfo(dtype).eps) ** 0.5 for dtype in dtypes), default=0.0)
