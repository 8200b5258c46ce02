"""What a forward is called with: which of it are tensors, and the values of all the rest."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

__all__ = ["Inputs", "UnknownInput"]


class UnknownInput(Exception):
    """An argument that is neither a tensor, nor plain, nor a list, tuple or dict of such."""


_TENSOR = "tensor"


def _describe(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _TENSOR
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return (kind, value)
    if kind in (list, tuple):
        return (kind, tuple(map(_describe, value)))
    if kind is dict:
        return (dict, tuple((k, _describe(v)) for k, v in value.items()))
    raise UnknownInput(kind.__name__)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif type(value) in (list, tuple):
        for item in value:
            yield from _tensors(item)
    elif type(value) is dict:
        for item in value.values():
            yield from _tensors(item)


def _rebuild(description: Any, tensors: Iterator[Any]) -> Any:
    if description is _TENSOR:
        return next(tensors)
    kind, inner = description
    if kind is dict:
        return {k: _rebuild(d, tensors) for k, d in inner}
    if kind in (list, tuple):
        return kind(_rebuild(d, tensors) for d in inner)
    return inner


class Inputs:
    """The arguments of a call but for the tensors' values."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.described = _describe((tuple(args), dict(kwargs)))
        self.count = sum(1 for _ in _tensors((tuple(args), dict(kwargs))))
        # The usual case, told by a glance: so many positional tensors.
        alone = len(args) == self.count and not kwargs
        self.positional = self.count if alone and all(isinstance(a, Tensor) for a in args) else -1

    @classmethod
    def of_signature(cls, forward: Callable[..., Any]) -> Inputs:
        """A tensor for each argument that ``forward`` asks for, beside the module.

        Raises:
            UnknownInput: for a signature that does not tell.
        """
        try:
            parameters = list(inspect.signature(forward).parameters.values())[1:]
        except (TypeError, ValueError):
            raise UnknownInput("no signature") from None
        count, kwargs = 0, {}
        for p in parameters:
            if p.default is not p.empty or p.kind is p.VAR_KEYWORD:
                continue
            if p.kind is p.VAR_POSITIONAL:
                count += 1
            elif p.kind is p.KEYWORD_ONLY:
                kwargs[p.name] = Tensor()
            else:
                count += 1
        return cls((Tensor(),) * count, kwargs)

    def fits(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if self.positional >= 0:
            if len(args) != self.positional or kwargs:
                return False
            return all([isinstance(a, Tensor) for a in args])  # noqa: C419 # a list is faster
        try:
            return bool(_describe((args, kwargs)) == self.described)
        except UnknownInput:
            return False

    def flat(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        """The tensors of a call that fits, in order."""
        return args if self.positional >= 0 else tuple(_tensors((args, kwargs)))

    def build(self, tensors: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) with these in the tensors' places."""
        args, kwargs = _rebuild(self.described, iter(tensors))
        return args, kwargs
