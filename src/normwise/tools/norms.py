"""What the tools ask of a model and its norms: which they are, and what a call was given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from normwise.errors import InputError, message

__all__ = ["Layers", "arguments_of", "boolean_mask", "chosen", "core", "drift", "largest"]

Layers = Iterable[str | nn.Module] | Callable[[str, nn.Module], bool]


def core(model: nn.Module) -> nn.Module:
    """The module inside what only distributes, replicates or compiles it: hooks work there, and a
    forward there waits for no other rank."""
    while True:
        wrapped: Any = None
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            wrapped = model.module
        elif type(model).__name__ == "OptimizedModule":  # importing it would load torch._dynamo
            wrapped = getattr(model, "_orig_mod", None)
        if not isinstance(wrapped, nn.Module):
            return model
        model = wrapped


def chosen(norms: Mapping[str, nn.Module], layers: Layers | None) -> set[str]:
    """The names of the ``norms`` that ``layers`` means: names or patterns, modules, a function;
    None for all.

    Raises:
        InputError: if a name or module of ``layers`` is none of them.
    """
    if layers is None:
        return set(norms)
    if callable(layers) and not isinstance(layers, nn.Module):
        return {name for name, module in norms.items() if layers(name, module)}
    wanted: set[str] = set()
    for one in [layers] if isinstance(layers, (str, nn.Module)) else layers:
        if isinstance(one, str):
            found = {name for name in norms if fnmatchcase(name, one)}
        else:
            found = {name for name, module in norms.items() if module is one}
        if not found:
            raise InputError(
                message(
                    "layers= names norms of the model, by name, pattern or module",
                    repr(one) if isinstance(one, str) else f"a {type(one).__name__} not in it",
                    f"one of {', '.join(list(norms)[:8])}{', …' if len(norms) > 8 else ''}",
                )
            )
        wanted |= found
    return wanted


@lru_cache(maxsize=256)
def _signature(kind: Any) -> inspect.Signature:
    return inspect.signature(kind.forward)


def arguments_of(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """The call's arguments by name, with the first as '0' too."""
    kind: Any = type(module)
    bound = _signature(kind).bind(module, *args, **kwargs).arguments
    values = list(bound.values())
    return {**bound, "0": values[1] if len(values) > 1 else None}


def boolean_mask(mask: Any) -> Tensor | None:
    """``mask`` if it is one; what is not, the layer itself refuses."""
    return mask if isinstance(mask, Tensor) and mask.dtype == torch.bool else None


def drift(
    mean: Tensor, var: Tensor, seen_mean: Tensor, seen_var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    r"""How far remembered statistics are from those of data with the unbiased variance
    :math:`s^2`, for each channel: :math:`|\mu - m| / \sqrt{s^2 + \epsilon}` and
    :math:`\log((\sigma^2 + \epsilon) / (s^2 + \epsilon))`."""
    shift = (mean - seen_mean).abs() * (seen_var + eps).rsqrt()
    return shift, torch.log((var + eps) / (seen_var + eps))


def largest(t: Tensor) -> Tensor:
    """The value of largest magnitude, with its sign; 0 of none."""
    return t.flatten()[t.abs().argmax()] if t.numel() else t.new_zeros(())
