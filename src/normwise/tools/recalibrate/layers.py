"""The norms of a model: which are recalibrated, their statistics, and why others are left."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from normwise.errors import InputError, NonFiniteError, message
from normwise.moments import Moments
from normwise.results import Entry
from normwise.tools.norms import Layers, chosen

__all__ = ["Layer", "Selection", "Statistics", "select"]


class Statistics(NamedTuple):
    """What a layer remembers: ``running_mean`` and ``running_var``, both (C,) and float64 where the
    device has it, and ``num_batches_tracked``."""

    mean: Tensor
    var: Tensor
    tracked: int

    def equals(self, other: Statistics) -> bool:
        return torch.equal(self.mean, other.mean) and torch.equal(self.var, other.var)

    def finite(self) -> bool:
        return bool(torch.isfinite(self.mean).all() & torch.isfinite(self.var).all())

    def initial(self) -> Statistics:
        return Statistics(torch.zeros_like(self.mean), torch.ones_like(self.var), 0)


@dataclass
class Layer:
    """A batch norm whose statistics are replaced; ``source`` are those that it had."""

    name: str
    module: _BatchNorm
    source: Statistics = field(init=False)

    def __post_init__(self) -> None:
        self.source = self.read()

    def read(self) -> Statistics:
        mean, var = self.module.running_mean, self.module.running_var
        assert mean is not None
        assert var is not None
        tracked = self.module.num_batches_tracked
        dtype = torch.float32 if mean.device.type == "mps" else torch.float64
        return Statistics(
            mean.detach().to(dtype, copy=True),
            var.detach().to(dtype, copy=True),
            0 if tracked is None else int(tracked),
        )

    def write(self, new: Statistics) -> None:
        """In place, so that whoever holds the buffers sees it."""
        module = self.module
        assert module.running_mean is not None
        assert module.running_var is not None
        with torch.no_grad():
            module.running_mean.copy_(new.mean)
            module.running_var.copy_(new.var)
            if module.num_batches_tracked is not None:
                module.num_batches_tracked.fill_(new.tracked)

    def proposal(self, seen: Moments, batches: int, blend: float) -> Statistics:
        """The statistics that ``seen`` asks for, as the layer's buffers can hold them."""
        if int(seen.count.min()) < 2:
            raise InputError(
                message(
                    "an unbiased variance needs two values a channel",
                    f"one value a channel in all the data for layer {self.name!r}",
                    "more data, or layers= without this one",
                )
            )
        source = self.source
        mean, var = seen.mean.to(source.mean), seen.variance(1).to(source.var)
        tracked = batches
        if blend < 1:  # not by arithmetic where it is 1: a source of NaN would stay NaN
            mean = source.mean + blend * (mean - source.mean)
            var = source.var + blend * (var - source.var)
            tracked += source.tracked
        buffer = self.module.running_var
        assert buffer is not None
        stored = Statistics(
            mean.to(buffer.dtype).to(mean.dtype), var.to(buffer.dtype).to(var.dtype), tracked
        )
        if not stored.finite():
            raise NonFiniteError(
                message(
                    "mean and variance are finite numbers of the buffers' dtype",
                    f"a variance up to {float(var.max()):.3g} for layer {self.name!r}, whose "
                    f"buffers are {buffer.dtype}",
                    "model.float(), or a source (blend=) that is finite",
                )
            )
        return stored


class Selection(NamedTuple):
    """The layers to recalibrate, and the entries of the norms that stay as they are."""

    layers: list[Layer]
    left: list[Entry]


def select(model: nn.Module, layers: Layers | None) -> Selection:
    """The norms of ``model`` that ``layers`` names, all of them if None.

    Raises:
        InputError: if there is none, or a name or module of ``layers`` is none.
    """
    norms: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (_BatchNorm, _InstanceNorm))
    }
    batch_norms = {n: m for n, m in norms.items() if isinstance(m, _BatchNorm)}
    if not batch_norms:
        raise InputError(
            message(
                "a model to recalibrate holds batch norms (modules derived from torch.nn's)",
                f"{type(model).__name__} with {len(norms) or 'no'} other norms",
                "the model before it was folded, scripted or exported",
            )
        )
    lazy = next(
        (n for n, t in (*model.named_parameters(), *model.named_buffers()) if is_lazy(t)), ""
    )
    if lazy:
        raise InputError(
            message(
                "lazy modules have their shapes before the model is recalibrated",
                f"{lazy!r} without",
                "one batch through the model first, in eval mode",
            )
        )
    wanted = chosen(norms, layers)
    picked, left = [], []
    for name, module in norms.items():
        reason = None
        if name not in wanted:
            reason = "not-selected"
        elif not isinstance(module, _BatchNorm):
            reason = "instance-norm" if module.track_running_stats else "no-running-statistics"
        elif not module.track_running_stats or module.running_mean is None:
            reason = "no-running-statistics"
        if reason is not None:
            left.append(Entry(name, "left", reason=reason))
            continue
        assert isinstance(module, _BatchNorm)
        picked.append(Layer(name, module))
    if not picked:
        raise InputError(
            message(
                "one batch norm at least has running statistics to replace",
                "; ".join(f"{e.name}: {e.reason}" for e in left[:8]),
                "other layers=, or track_running_stats=True",
            )
        )
    return Selection(picked, left)
