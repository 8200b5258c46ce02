"""``normwise fold``: batch norms into the layers around them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .inputs import add_input, add_model, inputs_of, model_of
from .output import add_output, show
from .progress import busy

if TYPE_CHECKING:
    from argparse import _SubParsersAction

__all__ = ["register"]


def register(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``fold`` to the command line."""
    parser = subparsers.add_parser(
        "fold",
        help="fold batch norms into the layers around them, and prove it",
        description="Folds the batch norms of a model in eval mode into the layers around them. "
        "Each fold is verified in float64 and in the model's dtype, or undone; the report says "
        "where each norm went, or why it stayed.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""\
examples:
  normwise fold --model torchvision.models:resnet18 --input 1x3x224x224
  normwise fold --model net:build --weights net.pt --input 1x3x32x32 -o folded.safetensors
  normwise fold --model net:build --input 1x3x32x32 -o folded.onnx --strict

folded.safetensors is read by nw.load_folded(model, path); .pt2 is a torch.export program,
.onnx an ONNX model.

Exit codes: 0 fine, 1 with --strict: a norm was left, 2 wrong usage, a model that cannot be
built or run, a file that cannot be written.""",
    )
    add_model(parser)
    add_input(parser, required=True)
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a norm was left")
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.5,
        metavar="S",
        help="how long to measure the latency (default: 0.5; 0 for not at all)",
    )
    add_output(parser, output="the folded model, by its suffix: .safetensors, .pt2 or .onnx")
    parser.set_defaults(run=run)


def _writer(path: str | None) -> str | None:
    """The method of the result that writes this kind of file."""
    from ..errors import InputError, message

    if path is None:
        return None
    kinds = {".safetensors": "save", ".pt2": "save_program", ".onnx": "to_onnx"}
    suffix = Path(path).suffix
    if suffix not in kinds:
        raise InputError(
            message(
                f"the suffix of -o says what is written: {', '.join(kinds)}",
                repr(path),
                "-o folded.safetensors",
            )
        )
    return kinds[suffix]


def run(arguments: argparse.Namespace) -> int:
    """Folds, writes, prints, and returns the exit code."""
    from ..graph import fold

    writer = _writer(arguments.output)  # before the work, not after it
    model = model_of(arguments).eval()
    with busy("folding"):
        result: Any = fold(model, inputs_of(arguments), seconds=arguments.seconds)
        if writer is not None:
            getattr(result, writer)(arguments.output)
    show(result.report, arguments, output=arguments.output)
    left = any(entry.action == "left" for entry in result.report)
    return 1 if arguments.strict and left else 0
