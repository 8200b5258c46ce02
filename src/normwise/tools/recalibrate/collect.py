"""Hooks on the norms: the moments of what they see, and of what they give in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from normwise.errors import InputError, NormwiseError, message
from normwise.functional import batch_moments
from normwise.moments import Moments
from normwise.nn.batchnorm import BatchNorm
from normwise.tools.norms import arguments_of, boolean_mask
from normwise.tools.recalibrate.layers import Layer

__all__ = ["Collector", "Pool"]


@dataclass
class Pool:
    """What one layer saw in one pass.

    seen, given: moments of its inputs and of its outputs; ``given`` is None where the output holds
    more than the norm (an activation, a residual). batches: how many reached the layer.
    nonfinite: (rank, batch) of the first that was not finite; it is not in the moments.
    rounding: the epsilon of the coarsest dtype among the inputs (float32, bfloat16 under autocast).
    """

    seen: Moments | None = None
    given: Moments | None = None
    batches: int = 0
    nonfinite: tuple[int, int] | None = None
    rounding: float = 0.0

    def add(self, other: Pool) -> None:
        """Merge what came later, or from a later rank."""
        self.seen = _merged(self.seen, other.seen)
        self.given = _merged(self.given, other.given)
        self.batches += other.batches
        self.nonfinite = self.nonfinite or other.nonfinite
        self.rounding = max(self.rounding, other.rounding)

    def on_cpu(self) -> Pool:
        seen, given = (None if m is None else m.to("cpu") for m in (self.seen, self.given))
        return Pool(seen, given, self.batches, self.nonfinite, self.rounding)

    @property
    def values(self) -> int:
        """How many values a channel."""
        return 0 if self.seen is None else int(self.seen.count)


def _merged(a: Moments | None, b: Moments | None) -> Moments | None:
    if a is None or b is None:
        return a or b
    return a.merge(b.to(a.mean.device))


@dataclass
class _Call:
    """The moments of the calls of one layer in one batch."""

    seen: list[Moments] = field(default_factory=list)
    given: list[Moments | None] = field(default_factory=list)
    rounding: float = 0.0


# Which forwards are the affine map and nothing else.
_PLAIN = (_BatchNorm.forward, nn.SyncBatchNorm.forward, BatchNorm.forward)


class Collector:
    """``with Collector(layers, ...) as c:`` then for each batch ``c.begin(i)``, the forward,
    ``c.end()``; ``c.pools`` holds what the layers saw.

    Args:
        layers: whose moments are taken.
        by_batch: the layers normalize by the batch in this pass.
        outputs: take the moments of the outputs too.
        rank: of this process, for ``Pool.nonfinite``.
    """

    def __init__(self, layers: Sequence[Layer], by_batch: bool, outputs: bool, rank: int) -> None:
        self.layers, self.by_batch, self.outputs, self.rank = layers, by_batch, outputs, rank
        self.pools: dict[str, Pool] = {layer.name: Pool() for layer in layers}
        self.order: list[str] = []  # of the first calls
        self.reused: set[str] = set()  # called more than once in a batch
        self.index = 0
        self.calls: dict[str, _Call] = {}
        self.refusal: NormwiseError | None = None

    def __enter__(self) -> Collector:
        self.handles: list[RemovableHandle] = []
        for layer in self.layers:
            # Last of the hooks before and first of those after: what the norm itself sees.
            before = layer.module.register_forward_pre_hook(
                partial(self._before, layer), with_kwargs=True
            )
            self.handles.append(before)
            if self.outputs:
                after = layer.module.register_forward_hook(
                    partial(self._after, layer), prepend=True, with_kwargs=True
                )
                self.handles.append(after)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self.handles:
            handle.remove()

    def begin(self, index: int) -> None:
        self.index, self.calls = index, {}

    def _before(self, layer: Layer, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = arguments_of(module, args, kwargs)
        x, mask = given["0"], given.get("mask")
        if not isinstance(x, Tensor):
            return  # the layer's own error says more
        moments = batch_moments(x.detach(), getattr(module, "channel_dim", 1), boolean_mask(mask))
        if self.by_batch and module.training and int(moments.count) == 1:
            self.refusal = InputError(
                message(
                    "to normalize by the batch takes two values a channel",
                    f"one value a channel (input {tuple(x.shape)}) for layer {layer.name!r} in "
                    f"batch {self.index}",
                    "mode='exact', which takes any batch size, or larger batches",
                )
            )
            raise self.refusal
        call = self.calls.setdefault(layer.name, _Call())
        call.seen.append(moments)
        call.rounding = max(call.rounding, torch.finfo(x.dtype).eps)

    def _after(self, layer: Layer, module: nn.Module, args: Any, kwargs: Any, y: Any) -> None:
        given = arguments_of(module, args, kwargs)
        plain = (
            type(module).forward in _PLAIN
            and getattr(module, "activation", None) is None
            and given.get("residual") is None
            and isinstance(y, Tensor)
        )
        moments = None
        if plain:
            axis = getattr(module, "channel_dim", 1)
            moments = batch_moments(y.detach(), axis, boolean_mask(given.get("mask")))
        self.calls.setdefault(layer.name, _Call()).given.append(moments)

    def end(self) -> None:
        """Merge the batch's moments: all of them at once, so that a batch costs one wait for the
        device. Moments that are not finite stay out, and the batch is noted."""
        batch = {
            name: Pool(
                Moments.sum(call.seen),
                Moments.sum(m for m in call.given if m is not None)
                if call.given and None not in call.given
                else None,
                1,
                rounding=call.rounding,
            )
            for name, call in self.calls.items()
            if call.seen
        }
        finite = {name: _finite(pool.seen) for name, pool in batch.items()}
        flags = torch.stack([f.cpu() for f in finite.values()]).tolist() if finite else []
        for (name, pool), good in zip(batch.items(), flags, strict=True):
            if name not in self.order:
                self.order.append(name)
            if len(self.calls[name].seen) > 1:
                self.reused.add(name)
            if not good:
                pool = Pool(nonfinite=(self.rank, self.index))
            self.pools[name].add(pool)

    def nonfinite_now(self) -> str | None:
        """The first layer that met something not finite in this batch, if its input owes nothing
        to any statistics: any, where they normalize by the batch; else the first call of the first
        that runs."""
        for name in self.order if self.by_batch else self.order[:1]:
            if self.pools[name].nonfinite == (self.rank, self.index) and (
                self.by_batch or not bool(_finite(self.calls[name].seen[0]))
            ):
                return name
        return None


def _finite(moments: Moments | None) -> Tensor:
    assert moments is not None
    return torch.isfinite(moments.mean).all() & torch.isfinite(moments.m2).all()
