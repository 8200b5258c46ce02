"""What goes through the model: batches of the data, and how a batch becomes a call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from normwise.errors import InputError, message

__all__ = ["Feed", "arguments_for", "batch_size", "tensors_of"]

Forward = Callable[[nn.Module, Any], Any]


def _fields(batch: Any) -> dict[str, Any] | None:
    """A dict or a dataclass by its names, else None."""
    if isinstance(batch, Mapping):
        return dict(batch)
    if is_dataclass(batch) and not isinstance(batch, type):
        return {f.name: getattr(batch, f.name) for f in fields(batch)}
    return None


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """Every tensor of a batch, in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif (named := _fields(batch)) is not None:
        for value in named.values():
            yield from tensors_of(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from tensors_of(value)


def batch_size(batch: Any) -> int:
    """The size of the first axis of the first tensor that has one; 1 if there is none."""
    return next((t.shape[0] for t in tensors_of(batch) if t.dim()), 1)


def _on(device: torch.device, value: Any) -> Any:
    """``value`` with its tensors on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (list, tuple):
        return type(value)(_on(device, v) for v in value)
    if type(value) is dict:
        return {k: _on(device, v) for k, v in value.items()}
    return value


class Feed:
    """The data of one call of recalibrate.

    Args:
        data: one tensor, dict or dataclass (one batch), or an iterable of batches.
        limit: how many batches to take, None all.
        forward: ``forward(model, batch)`` runs the model, if the batch does not say how.
        several: whether the data is gone through more than once.

    Raises:
        InputError: data that is no iterable, or an iterator where several passes are needed.
    """

    def __init__(self, data: Any, limit: int | None, forward: Forward | None, several: str) -> None:
        if limit is not None and (isinstance(limit, bool) or limit < 1):
            raise InputError(message("batches is 1 or more", repr(limit), "batches=None for all"))
        self.limit, self.forward = limit, forward
        if isinstance(data, Tensor) or _fields(data) is not None:
            data = [data]
        if not isinstance(data, Iterable):
            raise InputError(
                message(
                    "data is a tensor or an iterable of batches",
                    f"a {type(data).__name__}",
                    "a DataLoader, or a list of batches",
                )
            )
        if several and isinstance(data, Iterator):
            raise InputError(
                message(
                    f"{several} goes through the data several times",
                    f"a {type(data).__name__}, which can be read only once",
                    "list(data), the DataLoader itself, or mode='batch' without metric=",
                )
            )
        self.data: Iterable[Any] = data

    def __len__(self) -> int:
        """How many batches a pass has; 0 if that is not known."""
        try:
            known = len(self.data)  # type: ignore[arg-type] # unsized raises TypeError
        except (TypeError, NotImplementedError):
            return self.limit or 0
        return known if self.limit is None else min(known, self.limit)

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.data), self.limit)

    def run(self, model: nn.Module, batch: Any) -> Any:
        """The model's output for a batch."""
        if self.forward is not None:
            return self.forward(model, batch)
        args, kwargs = arguments_for(model, batch)
        device = next((t.device for t in chain(model.parameters(), model.buffers())), None)
        if device is not None and device.type != "meta":
            args, kwargs = _on(device, args), _on(device, kwargs)
        return model(*args, **kwargs)


def arguments_for(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that a batch holds, by the signature of the model's forward.

    By name: those that forward takes. By place: as many as forward requires (one at least), so
    that the target of ``(x, y)`` does not become an optional argument.
    """
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    kinds = {p.kind for p in parameters}
    named = _fields(batch)
    if named is not None:
        if inspect.Parameter.VAR_KEYWORD in kinds or not parameters:
            return (), named
        takes = {p.name for p in parameters if p.kind is not inspect.Parameter.POSITIONAL_ONLY}
        return (), {name: value for name, value in named.items() if name in takes}
    if not isinstance(batch, (list, tuple)):
        return (batch,), {}
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return tuple(batch), {}
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters if p.kind in by_place and p.default is p.empty]
    return tuple(batch[: max(1, len(required))]), {}
