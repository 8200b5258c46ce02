"""Models, data and inputs as the command line names them."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Set
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import InputError, message

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "add_data",
    "add_input",
    "add_model",
    "data_of",
    "inputs_of",
    "model_of",
    "shape",
    "whole_number",
]

_SHAPE = re.compile(r"(\d+(?:x\d+)*)(?::(\w+))?")
DTYPES = ("float64", "float32", "bfloat16", "float16", "int64", "int32", "bool")
_FUNCTION = "package.module:function"


def shape(text: str) -> tuple[int, ...]:
    """``'1x3x224x224'`` as numbers, for argparse."""
    if not re.fullmatch(r"\d+(x\d+)*", text):
        raise argparse.ArgumentTypeError(
            f"a shape is numbers with x between; got {text!r}. Try: 1x3x224x224"
        )
    return tuple(map(int, text.split("x")))


def whole_number(text: str) -> int:
    """A positive integer, for argparse."""
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it must be an integer >= 1; got {text!r}. Try: 8")
    return int(text)


def _input(text: str) -> tuple[tuple[int, ...], str]:
    match = _SHAPE.fullmatch(text)
    if match is None or (match[2] or "float32") not in DTYPES:
        raise argparse.ArgumentTypeError(
            f"an input is a shape, with :dtype ({', '.join(DTYPES)}) if it is not float32; got "
            f"{text!r}. Try: 1x3x224x224, or 1x128:int64"
        )
    return shape(match[1]), match[2] or "float32"


def add_model(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """``--model`` and ``--weights``."""
    parser.add_argument(
        "--model",
        required=required,
        metavar="MODULE:FUNCTION",
        help="a function that returns the model (the working directory can be imported from)",
    )
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="a checkpoint for the model; nothing in it is run (.safetensors, .pt, a folder)",
    )


def add_data(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """``--data`` and ``--batches``."""
    parser.add_argument(
        "--data",
        required=required,
        metavar="MODULE:FUNCTION",
        help="a function that returns batches: a DataLoader, a list, a generator",
    )
    parser.add_argument(
        "--batches", type=whole_number, metavar="N", help="use the first so many batches"
    )


def add_input(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """``--input``, once for each argument of the model."""
    parser.add_argument(
        "--input",
        dest="inputs",
        type=_input,
        action="append",
        required=required,
        metavar="SHAPE[:DTYPE]",
        help="what the model is called with, such as 1x3x224x224 or 1x128:int64: random numbers, "
        "zeros for integers; again for each further argument",
    )


def _named(spec: str, option: str) -> Any:
    """What ``package.module:name`` names, imported with the working directory in the path."""
    module, colon, name = spec.partition(":")
    if not (module and colon and name):
        raise InputError(
            message(
                f"{option} names a function as {_FUNCTION}",
                repr(spec),
                f"{option} {module or 'models'}:build",
            )
        )
    here = os.getcwd()
    if here not in sys.path:
        # As `python -m` does; it stays, for what the function imports later on.
        sys.path.insert(0, here)
    try:
        value: Any = import_module(module)
    except Exception as error:
        raise InputError(
            message(
                f"the module of {option} can be imported",
                f"{type(error).__name__}: {error}",
                f'python -c "import {module}", from the same directory',
            )
        ) from error
    for part in name.split("."):
        if not hasattr(value, part):
            public = [n for n in vars(value) if not n.startswith("_") and callable(vars(value)[n])]
            raise InputError(
                message(
                    f"{option} names something in {module}",
                    f"{name!r}, which is not there",
                    ", ".join(public[:8]) or "another module",
                )
            )
        value = getattr(value, part)
    return value


def _called(function: Callable[[], Any], option: str) -> Any:
    try:
        return function()
    except Exception as error:
        raise InputError(
            message(
                f"the function of {option} is called without arguments and returns",
                f"{type(error).__name__}: {error}",
                "a function of your own that calls it with the arguments it needs",
            )
        ) from error


def model_of(arguments: argparse.Namespace) -> nn.Module:
    """The model that ``--model`` builds, with the weights of ``--weights``."""
    from torch import nn

    value = _named(arguments.model, "--model")
    # A class is a function that returns a model.
    model = value if isinstance(value, nn.Module) else _called(value, "--model")
    if not isinstance(model, nn.Module):
        raise InputError(
            message(
                "--model returns a torch.nn.Module",
                f"{type(model).__module__}.{type(model).__qualname__}",
                "a function without arguments that ends in `return model`",
            )
        )
    if arguments.weights is not None:
        _load(model, arguments.weights)
    return model


def _load(model: nn.Module, path: str) -> None:
    """The tensors of a checkpoint, which may come from anyone, into the model."""
    from ..interop.checkpoints import open_checkpoint

    with open_checkpoint(path) as checkpoint:
        state = {name: checkpoint.read(name) for name in checkpoint.tensors}
    prefix = _prefix(set(model.state_dict()), state)
    try:
        model.load_state_dict({prefix + name: t for name, t in state.items()})
    except RuntimeError as error:
        raise InputError(
            message(
                f"the weights are those of the model ({type(model).__name__})",
                f"{path!r} ({' '.join(str(error).split())[:400]})",
                "--model with the function that built the model which was saved",
            )
        ) from error


def _prefix(wanted: Set[str], names: Collection[str]) -> str:
    """What the reader took off the names as a wrapper's (``'module.'``), and is the model's."""
    first = next(iter(names), "")
    found = (key.removesuffix(first) for key in wanted if key.endswith(first))
    return next((p for p in sorted(found) if all(p + name in wanted for name in names)), "")


class _Again:
    """A generator function as data that can be gone through several times."""

    def __init__(self, function: Callable[[], Any], first: Iterator[Any]) -> None:
        self.function, self.first = function, [first]

    def __iter__(self) -> Iterator[Any]:
        return self.first.pop() if self.first else iter(_called(self.function, "--data"))


def data_of(spec: str) -> Any:
    """The batches that ``--data`` names."""
    value = _named(spec, "--data")
    if not callable(value):
        return value
    data = _called(value, "--data")
    return _Again(value, data) if isinstance(data, Iterator) else data


def inputs_of(arguments: argparse.Namespace) -> tuple[Tensor, ...] | None:
    """The tensors that ``--input`` describes: the same numbers each time."""
    if not arguments.inputs:
        return None
    import torch

    generator = torch.Generator().manual_seed(0)
    tensors = []
    for size, name in arguments.inputs:
        dtype = getattr(torch, name)
        if dtype.is_floating_point:
            tensors.append(torch.randn(size, generator=generator).to(dtype))
        else:
            tensors.append(torch.zeros(size, dtype=dtype))
    return tuple(tensors)
