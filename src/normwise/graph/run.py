"""How a model is called on example inputs, again and again, with nothing left behind."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from normwise.errors import InputError, message

__all__ = ["Call", "copy_of", "same_random_numbers", "tensors_in"]


@dataclass(frozen=True)
class Call:
    """``model(*args, **kwargs)``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, example_inputs: Any) -> Call:
        """A tensor is the one argument; a tuple or list all of them; a dict the keyword ones."""
        if isinstance(example_inputs, Mapping):
            return cls((), dict(example_inputs))
        if isinstance(example_inputs, (tuple, list)):
            return cls(tuple(example_inputs), {})
        return cls((example_inputs,), {})

    def tensors(self) -> list[Tensor]:
        return [t for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]

    def copy(self) -> Call:
        """With tensors of its own: a model may write to its inputs."""
        args, kwargs = tree_map_only(Tensor, lambda t: t.detach().clone(), (self.args, self.kwargs))
        return Call(args, kwargs)

    def to(self, dtype: torch.dtype) -> Call:
        """With floating tensors in ``dtype``."""
        args, kwargs = tree_map_only(
            Tensor,
            lambda t: t.detach().to(dtype) if t.is_floating_point() else t,
            (self.args, self.kwargs),
        )
        return Call(args, kwargs)

    def run(self, model: nn.Module) -> Any:
        return model(*self.args, **self.kwargs)


@contextlib.contextmanager
def same_random_numbers(seed: int = 0) -> Iterator[None]:
    """The same random numbers in each such block; outside nothing has moved."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy, or a clear error."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise InputError(
            message(
                "a model is edited as a deep copy of itself",
                f"{type(model).__name__}, whose copy.deepcopy fails with {type(error).__name__}: "
                f"{error}",
                "a model without results of computations, locks, streams or open files among its "
                "attributes (detach() such tensors)",
            )
        ) from error


def tensors_in(tree: Any, depth: int = 4) -> list[Tensor]:
    """The tensors of a result: containers, dataclasses and plain objects that hold some."""
    found: list[Tensor] = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif depth and not isinstance(leaf, (str, bytes, nn.Module, type)):
            if isinstance(leaf, Mapping):
                inner: Any = list(leaf.values())
            elif hasattr(leaf, "__dict__"):
                inner = list(vars(leaf).values())
            else:
                continue
            found += tensors_in(inner, depth - 1)
    return found
