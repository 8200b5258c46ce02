"""How a model is called on example inputs, again and again, with nothing left behind."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from normwise.errors import InputError, message

__all__ = ["Call", "copy_of", "not_running", "on_examples", "same_random_numbers", "tensors_in"]


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


def not_running(error: Exception) -> InputError:
    """What to raise from ``error``, with which the model ended on the example inputs."""
    return InputError(
        message(
            "the model must run on the example inputs",
            f"{type(error).__name__}: {error}",
            "example inputs as the model is called with: a tensor, a tuple of positional "
            "arguments, or a dict of keyword arguments",
        )
    )


@contextlib.contextmanager
def on_examples() -> Iterator[None]:
    """Around a run on the example inputs: whatever it raises becomes :func:`not_running`."""
    try:
        yield
    except Exception as error:
        raise not_running(error) from error


@contextlib.contextmanager
def same_random_numbers(seed: int = 0) -> Iterator[None]:
    """The same random numbers in each such block; outside nothing has moved."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        # Not torch.manual_seed: before CUDA is up, that leaves a note (with a formatted traceback,
        # 3 ms) that seeds its generators when it comes up, after this block.
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        python = random.getstate()
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)


def _results_in(tree: Any, depth: int = 4) -> Iterator[Tensor]:
    """Tensors in attributes that are results of computations, which copy.deepcopy refuses."""
    if isinstance(tree, Tensor):
        if not tree.is_leaf:
            yield tree
    elif depth:
        inner = tree.values() if isinstance(tree, dict) else tree
        if isinstance(inner, (list, tuple, set, type({}.values()))):
            for item in inner:
                yield from _results_in(item, depth - 1)


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy. Results of an earlier forward that the model keeps are copied without graph.

    Raises:
        InputError: if the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for t in _results_in(vars(module)):
            memo[id(t)] = t.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise InputError(
            message(
                "a model is edited as a deep copy of itself",
                f"{type(model).__name__}, whose copy.deepcopy fails with {type(error).__name__}: "
                f"{error}",
                "a model without locks, streams, generators or open files among its attributes",
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
